"""The real architectures at their true sizes, on the meta device: adapter layers, files, and who is whose sibling."""

import itertools
import re
from dataclasses import dataclass
from functools import cache

import comfy.lora
import comfy.model_patcher
import pytest
import torch
from comfy_extras import nodes_model_advanced as advanced

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.comfyui.backbones import (
    UnsupportedModel,
    backbone_of,
    check_adapter,
    describe_base,
    layout_of,
)
from comfyui_agd.agd_core.config import BaseInfo
from comfyui_agd.agd_core.lora import lora_key
from comfyui_agd.tests.support.architectures import UNETS
from comfyui_agd.tests.support.checkpoints import on_meta
from comfyui_agd.tests.support.small import config_for, info_for

# ComfyUI's own x4 upscaler.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")


@dataclass(frozen=True)
class Expected:
    family: str
    prediction: str
    layers: int
    widths: set[int]
    context_dim: int
    in_channels: int = 4


SD, XL = {320, 640, 1280}, {640, 1280}
EXPECTED = {
    "SD 1.5": Expected("SD15", "EPS", 16, SD, 768),
    "SD 1.5 inpainting": Expected("SD15", "EPS", 16, SD, 768, 9),
    "SD 1.5 InstructPix2Pix": Expected("SD15_instructpix2pix", "EPS", 16, SD, 768, 8),
    "Stable Zero123": Expected("Stable_Zero123", "EPS", 16, SD, 768, 8),
    "SD 2.1 base": Expected("SD20", "EPS", 16, SD, 1024),
    "SD 2.1": Expected("SD20", "V_PREDICTION", 16, SD, 1024),
    "SD 2 inpainting": Expected("SD20", "EPS", 16, SD, 1024, 9),
    "SD 2.1 unCLIP H": Expected("SD21UnclipH", "V_PREDICTION", 16, SD, 1024),
    "SD x4 upscaler": Expected("SD_X4Upscaler", "V_PREDICTION", 16, {512, 1024}, 1024, 7),
    "SDXL": Expected("SDXL", "EPS", 70, XL, 2048),
    "SDXL v": Expected("SDXL", "V_PREDICTION", 70, XL, 2048),
    "SDXL v zsnr": Expected("SDXL", "V_PREDICTION", 70, XL, 2048),
    "SDXL inpainting": Expected("SDXL", "EPS", 70, XL, 2048, 9),
    "SDXL InstructPix2Pix": Expected("SDXL_instructpix2pix", "EPS", 70, XL, 2048, 8),
    "CosXL": Expected("SDXL", "V_PREDICTION_EDM", 70, XL, 2048),
    "Playground 2.5": Expected("SDXL", "EDM", 70, XL, 2048),
    "SDXL refiner": Expected("SDXLRefiner", "EPS", 44, {768, 1536}, 1280),
    "SSD-1B": Expected("SSD1B", "EPS", 34, XL, 2048),
    "Segmind Vega": Expected("Segmind_Vega", "EPS", 15, XL, 2048),
    "KOALA 700M": Expected("KOALA_700M", "EPS", 21, XL, 2048),
}
# Pictures to fill in, or another noise schedule, change nothing of what an adapter sees. Everything else is alone.
SIBLINGS = (
    {"SD 1.5", "SD 1.5 inpainting"},
    {"SD 2.1 base", "SD 2 inpainting"},
    {"SDXL", "SDXL inpainting"},
    {"SDXL v", "SDXL v zsnr"},
)


def siblings_of(name: str) -> set[str]:
    return next((group for group in SIBLINGS if name in group), {name})


model_of = cache(on_meta)


@cache
def base_of(name: str) -> BaseInfo:
    return describe_base(model_of(name))


@pytest.fixture(autouse=True, scope="module")
def let_go_of_the_models():
    yield
    model_of.cache_clear()


def test_the_table_is_complete():
    assert EXPECTED.keys() == UNETS.keys() - {"SVD"}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_cross_attention_is_found(name):
    expected, base = EXPECTED[name], base_of(name)
    assert (base.family, base.prediction) == (expected.family, expected.prediction)
    assert base.architecture["in_channels"] == expected.in_channels
    assert len(base.layers) == expected.layers
    assert {layer.width for layer in base.layers} == expected.widths
    assert {layer.context_dim for layer in base.layers} == {expected.context_dim}
    # Counted another way: by the weights' names.
    weights = model_of(name).diffusion_model.state_dict()
    assert len(base.layers) == sum(key.endswith(".attn2.to_q.weight") for key in weights)


def test_zero_terminal_snr_is_seen():
    """The two SDXL v differ in their schedule alone, which samplers and training ask the model for."""
    plain, zsnr = (float(model_of(name).model_sampling.sigma_max) for name in ("SDXL v", "SDXL v zsnr"))
    assert plain == pytest.approx(14.6, abs=0.1)
    assert zsnr > 1000


@pytest.mark.parametrize("name", EXPECTED)
def test_an_adapter_of_true_size_has_every_weight_of_its_layers(name):
    base = base_of(name)
    with torch.device("meta"):
        adapter = Adapter(config_for(base.layers, "cross_attention", hidden=128))
    shapes = {key: tuple(value.shape) for key, value in adapter.state_dict().items() if key.startswith("kind.")}
    named = {part for key in shapes for part in key.split(".")}
    names = {layer.name for layer in base.layers}
    assert {part for part in named if part.startswith(("input_", "middle_", "output_"))} == names
    for layer in base.layers:
        own = {shape for key, shape in shapes.items() if layer.name in key.split(".")}
        assert own >= {(128, layer.width), (layer.width, 128), (layer.width,)}
    # Keys and values of the prompt, for every layer.
    rows = [shape[0] for key, shape in shapes.items() if key.split(".")[-2].startswith(("to_k", "to_v"))]
    assert sum(rows) == 2 * 128 * len(base.layers)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_loads_onto_its_siblings_and_nothing_else(name, tmp_path):
    info = info_for(base_of(name), hidden=8, encoder_width=8)
    file = adapter_file.save(tmp_path / "adapter.safetensors", Adapter(info.config), info)
    read, _ = adapter_file.load(file)
    assert read == info
    for other in EXPECTED:
        if other in siblings_of(name):
            adapter_file.check_base(read, base_of(other), file)
            continue
        with pytest.raises(AdapterFileError) as refused:
            adapter_file.check_base(read, base_of(other), file)
        ours, theirs = base_of(name).describe(), base_of(other).describe()
        assert ours != theirs
        assert f"the adapter {file} was made for {ours}, but this model is {theirs}." in str(refused.value)
        told = re.match(r"This adapter is for (.+?), your checkpoint is (.+?)\. Choose ", str(refused.value)).groups()
        assert told[0] != told[1]
        assert "_" not in "".join(told)  # the names of code


def test_a_refusal_says_what_differs():
    def refusal(adapter: str, model: str) -> str:
        with pytest.raises(AdapterFileError) as refused:
            adapter_file.check_base(info_for(base_of(adapter)), base_of(model), "a.safetensors")
        return str(refused.value)

    assert "Layers that differ" not in refusal("SDXL", "SDXL v")
    assert "SDXL with eps-prediction, your checkpoint is SDXL with v-prediction." in refusal("SDXL", "SDXL v")
    assert "This adapter is for SDXL, your checkpoint is SSD-1B. " in refusal("SDXL", "SSD-1B")
    assert "Layers that differ: " in refusal("SDXL", "SSD-1B")


@pytest.mark.parametrize(
    ("node", "arguments", "prediction", "sibling"),
    [
        (advanced.ModelSamplingDiscrete, ("v_prediction", True), "V_PREDICTION", "SDXL v"),
        (advanced.ModelSamplingDiscrete, ("eps", False), "EPS", "SDXL"),
        (advanced.ModelSamplingDiscrete, ("lcm", False), "EPS", "SDXL"),
        (advanced.ModelSamplingContinuousEDM, ("v_prediction", 120.0, 0.002), "V_PREDICTION_EDM", "CosXL"),
        (advanced.ModelSamplingContinuousEDM, ("edm", 120.0, 0.002), "EDM", "Playground 2.5"),
    ],
)
def test_a_prediction_that_a_node_sets_is_the_prediction(node, arguments, prediction, sibling):
    """Checkpoints with v-prediction that don't say so are used with such a node."""
    cpu = torch.device("cpu")
    model = comfy.model_patcher.CoreModelPatcher(model_of("SDXL"), load_device=cpu, offload_device=cpu)
    (patched,) = node().patch(model, *arguments)
    base = describe_base(patched.model, patched.get_model_object("model_sampling"))
    assert base.prediction == prediction
    assert base.sibling_of(base_of(sibling))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_models_own_sampling_says_the_prediction_that_was_detected(name):
    model = model_of(name)
    assert describe_base(model, model.model_sampling) == base_of(name)


@pytest.mark.parametrize(("one", "other"), itertools.combinations(["SD 1.5", "SD 2.1", "SDXL"], 2))
def test_checkpoints_of_one_structure_share_their_layers_names(one, other):
    """Names tell places, not models: only widths and contexts keep SD 1.5 and SD 2.1 apart."""
    names = [{layer.name for layer in base_of(name).layers} for name in (one, other)]
    assert (names[0] == names[1]) == ("SDXL" not in (one, other))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_low_rank_adapter_finds_its_linear_layers_and_a_lora_their_names(name):
    model, layers = model_of(name), base_of(name).layers
    check_adapter(backbone_of(model), config_for(layers, "low_rank"))
    names = comfy.lora.model_lora_keys_unet(model, {})
    for layer in layers:
        assert len(layer.linears) == 10
        for linear in layer.linears:
            weight = names[lora_key(layer.path, linear.path)]
            assert weight == f"diffusion_model.{layer.path}.{linear.path}.weight"


def test_keys_and_values_of_a_self_attention_that_reads_the_prompt_are_the_prompts():
    """The blocks of the upscaler have two attentions to the prompt."""
    for name, counts in (("SD x4 upscaler", {2, 4}), ("SD 1.5", {2})):
        assert {sum(linear.reads_prompt for linear in layer.linears) for layer in base_of(name).layers} == counts


def test_linear_layers_of_other_sizes_are_refused():
    other = config_for(base_of("SD 2.1 base").layers, "low_rank")
    with pytest.raises(UnsupportedModel, match=r"needs attn2.to_k in block \w+ to be a linear layer from 1024 to 320 "):
        check_adapter(backbone_of(model_of("SD 1.5")), other)


def test_the_size_of_our_cross_attention_without_its_switches_on_sdxl():
    """At H = 128; the paper authors' own has 52.0 million parameters, 2.0 % (docs/method.md)."""
    model = model_of("SDXL")
    plain = {"kind": "cross_attention", "gain": False, "omega_embedding": "fourier", "shared_encoder": False}
    with torch.device("meta"):
        adapter = Adapter(config_for(base_of("SDXL").layers, hidden=128, **plain))
    total = sum(p.numel() for p in model.diffusion_model.parameters())
    assert adapter.parameter_count() == pytest.approx(97.4e6, rel=0.001)
    assert adapter.parameter_count() / total == pytest.approx(0.038, abs=0.0005)


def test_video_models_are_refused():
    with pytest.raises(UnsupportedModel, match=r"^Video models can't .* Choose 'training-free' .* is a video block"):
        describe_base(on_meta("SVD"))


def test_other_models_are_refused_by_structure():
    with pytest.raises(UnsupportedModel, match=r"^This kind of model can't have an adapter: .*SDXL") as refused:
        layout_of(torch.nn.Linear(2, 2))
    assert "Choose 'training-free' in AGD Adapter Loader" in str(refused.value)
    assert "Details: this model is a Linear, which has neither a UNet" in str(refused.value)

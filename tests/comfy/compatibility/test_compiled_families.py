"""Core's TorchCompileModel on transformers with adapters. Attention is PyTorch's own, as on NVIDIA cards."""

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel
from torch._dynamo.utils import counters

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterInfo
from comfyui_agd.agd_core.comfyui.fused_attention import FUSED_ATTENTION
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.sampling import merging, messages
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings
from comfyui_agd.agd_core.config import AdapterConfig
from comfyui_agd.agd_core.kinds import kind_config
from comfyui_agd.tests.support.family_adapters import TinyClip, adapted, adapter_of, base_of
from comfyui_agd.tests.support.runtime import Prompts, ksampler
from comfyui_agd.tests.support.small import randomised
from comfyui_agd.tests.support.tiny_families import TINY_FAMILIES, conditioning, empty_latent, flat, tiny_model

JOINT, CROSS = "sd3", "wan2.1-t2v"
# Those that aren't: two are several graphs in themselves, and the attentions of three don't ask for an override.
SEVERAL_GRAPHS, UNHOOKED = ("hunyuan-video-1.5", "ltx-2"), ("pixart", "hunyuan-dit", "ernie-image")
ONE_GRAPH = [name for name in TINY_FAMILIES if name not in SEVERAL_GRAPHS + UNHOOKED]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def compiling(model):
    return TorchCompileModel.execute(model, "eager").args[0]


def fused(model):
    model = model.clone()
    model.model_options["transformer_options"].update(FUSED_ATTENTION)
    return model


def sample(name: str, model, negative: str = "blurry, dark", wider: int = 1, **options) -> torch.Tensor:
    prompts = Prompts(conditioning(name, "a fox"), conditioning(name, negative))
    return flat(ksampler(model, prompts, at=empty_latent(name, wider=wider), **options))


def with_adapter(model, adapter, omega=None, notify=lambda message: None):
    return apply_adapter(model, *adapter, GuidanceSettings(guidance_scale=omega), source="the file", notify=notify)


def adapter_of_first_block(name: str):
    base = base_of(name)
    config = AdapterConfig(base.layers[:1], kind_config("low_rank", rank=2), 8)
    return AdapterInfo(config=config, base=base, omega_range=(1.0, 12.0)), randomised(Adapter(config)).state_dict()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "name",
    [JOINT, CROSS] + [pytest.param(name, marks=pytest.mark.matrix) for name in ONE_GRAPH if name not in (JOINT, CROSS)],
)
def test_a_transformer_is_one_graph_with_its_adapter(name):
    """Another omega, another negative prompt and the same adapter loaded again are no other graphs; an adapter without
    a change of the vector, or with nothing else, is."""
    base, said = fused(tiny_model(name)), []
    compiled = compiling(base)

    def check(made: int, adapter=adapter_of(name), negative: str = "blurry, dark", omega: float | None = None) -> None:
        expected = sample(name, with_adapter(base, adapter, omega), negative)
        found = sample(name, with_adapter(compiled, adapter, omega, said.append), negative)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert graphs() == made

    check(1)
    check(1, omega=2.0)
    check(1, negative="a green one")
    check(2, adapter_of(name, vector=0))
    check(3, adapter_of(name, "low_rank"))
    check(3)
    plain = sample(name, base, cfg=1.0)
    assert torch.equal(sample(name, adapted(name, compiled), cfg=1.0), plain)
    assert torch.equal(sample(name, compiled, cfg=1.0), plain)
    assert said == []


def test_where_blocks_are_compiled_one_by_one_the_whole_network_is():
    base, said = fused(tiny_model(JOINT)), []
    compiled = base.clone()
    keys = [f"diffusion_model.joint_blocks.{index}" for index in range(2)]
    set_torch_compile_wrapper(compiled, backend="eager", keys=keys)
    found = sample(JOINT, adapted(JOINT, compiled, notify=said.append))
    torch.testing.assert_close(found, sample(JOINT, adapted(JOINT, base)), rtol=1e-4, atol=1e-4)
    assert (graphs(), said) == (1, [])


def test_another_nodes_forward_is_compiled_too_and_stays():
    base = fused(tiny_model(JOINT))
    network = base.model.diffusion_model
    own = type(network).forward.__get__(network)

    def doubled(*args, **kwargs):
        return 2 * own(*args, **kwargs)

    network.forward = doubled
    found, expected = sample(JOINT, adapted(JOINT, compiling(base))), sample(JOINT, adapted(JOINT, base))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert network.forward is doubled
    del network.forward
    assert not torch.allclose(found, sample(JOINT, adapted(JOINT, base)))


@pytest.mark.parametrize(
    ("name", "message"),
    [(name, messages.UNCOMPILED_FOR_GRAPH_BREAKS) for name in SEVERAL_GRAPHS]
    + [(name, messages.UNCOMPILED_FOR_HOOKS) for name in UNHOOKED],
)
def test_what_is_not_one_graph_runs_uncompiled_and_says_so(name, message):
    base, said = fused(tiny_model(name)), []
    found = sample(name, adapted(name, compiling(base), notify=said.append))
    assert said == [message]
    torch.testing.assert_close(found, sample(name, adapted(name, base)), rtol=1e-4, atol=1e-4)


@torch._dynamo.config.patch(recompile_limit=1)
def test_after_too_many_sizes_it_runs_uncompiled_and_says_so():
    base, said = fused(tiny_model(JOINT)), []
    model = adapted(JOINT, compiling(base), notify=said.append)
    sample(JOINT, model)
    assert said == []
    found = sample(JOINT, model, wider=2)
    assert said == [messages.UNCOMPILED_FOR_TOO_MANY_GRAPHS]
    torch.testing.assert_close(found, sample(JOINT, adapted(JOINT, base), wider=2), rtol=1e-4, atol=1e-4)


def test_changes_beside_the_layers_are_in_the_graph(monkeypatch):
    """As on quantised bases. Two adapters that change other layers are other graphs."""
    base, said = fused(tiny_model(JOINT)), []
    compiled, first, second = compiling(base), adapter_of(JOINT, "low_rank", vector=0), adapter_of_first_block(JOINT)
    monkeypatch.setattr(merging, "can_merge", lambda guider, lora: False)
    for adapters, made in (([first], 1), ([second], 2), ([first, second], 3), ([first], 3)):
        expected, found = base, compiled
        for adapter in adapters:
            expected, found = with_adapter(expected, adapter, 2.0), with_adapter(found, adapter, 2.0, said.append)
        torch.testing.assert_close(sample(JOINT, found), sample(JOINT, expected), rtol=1e-4, atol=1e-4)
        assert graphs() == made
    assert not [message for message in said if "ncompiled" in message]


@pytest.mark.parametrize("parts", [["diffusion_model"], ["diffusion_model.joint_blocks.0"]], ids=["whole", "a block"])
def test_where_a_node_has_put_compiled_parts_in_place_the_originals_run_and_it_says_so(parts):
    """As compile nodes of other packs do, by object patches: a LoRA's names are others there, and hooks unseen."""
    base, said = fused(tiny_model(JOINT)), []
    compiled = base.clone()
    for part in parts:
        compiled.add_object_patch(part, torch.compile(base.get_model_object(part), backend="eager"))
    plain = sample(JOINT, compiled, cfg=1.0)  # which leaves them in place
    assert torch.equal(sample(JOINT, adapted(JOINT, compiled, notify=said.append)), sample(JOINT, adapted(JOINT, base)))
    assert said == [messages.UNCOMPILED_FOR_REPLACED_PARTS]
    before = graphs()
    assert torch.equal(sample(JOINT, compiled, cfg=1.0), plain)
    assert graphs() == before > 0


def test_a_training_of_compiled_parts_is_of_the_originals():
    base = tiny_model(JOINT)
    compiled, part = base.clone(), "diffusion_model.joint_blocks.0"
    compiled.add_object_patch(part, torch.compile(base.get_model_object(part), backend="eager"))
    sample(JOINT, compiled, cfg=1.0)
    ComfyModel(compiled, TinyClip(JOINT))
    assert base.model.diffusion_model.joint_blocks[0] is base.get_model_object(part)

"""Training on quantised transformers, and what else is on them."""

import comfy.model_management as mm
import comfy.sd
import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones import backbone_of
from comfyui_agd.agd_core.comfyui.guided_step import ActiveAdapter, GuidedStep
from comfyui_agd.agd_core.comfyui.model import tracing
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.denoiser import with_adapter
from comfyui_agd.tests.support.family_adapters import TinyClip, adapted, base_of, config_of
from comfyui_agd.tests.support.quantised import WAYS, quantised_model
from comfyui_agd.tests.support.runtime import Prompts, ksampler, since
from comfyui_agd.tests.support.small import randomised
from comfyui_agd.tests.support.tiny_families import conditioning, empty_latent, flat, tiny_model
from comfyui_agd.training.presets import settings_for
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import train

PROMPTS = ["a fox", "a green door", "two cats"]
each = pytest.mark.parametrize(("name", "way"), [(name, way) for name in ("sd3", "wan2.1-t2v") for way in WAYS])


@pytest.fixture(autouse=True)
def _release():
    since("0.30.0")


def sample(name: str, model, **options) -> torch.Tensor:
    given = Prompts(conditioning(name, "a fox"), conditioning(name, "dark"))
    return flat(ksampler(model, given, at=empty_latent(name), **options))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def gradients(name: str, model: ComfyModel, checkpointing: bool) -> list[torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = randomised(Adapter(config_of(name)))
    denoiser = model.denoiser
    x = torch.randn(1, *denoiser.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    positive, negative = (model.text_encoder.encode([text]) for text in ("a fox", "dark"))
    with denoiser.session(checkpointing=checkpointing):
        sigma = denoiser.sigmas("simple", 4)[1:2]
        denoiser.student(adapter, x, sigma, positive, negative, torch.tensor([3.0])).square().mean().backward()
    return [parameter.grad for _, parameter in adapter.trained()]


@each
def test_checkpointing_leaves_gradients_as_they_are(name, way):
    model = ComfyModel(quantised_model(name, way), TinyClip(name))
    for one, other in zip(*(gradients(name, model, on) for on in (False, True)), strict=True):
        assert one.any()
        assert torch.equal(one, other)


@each
def test_with_matrix_products_in_fp8_it_can_be_trained_and_planned(name, way, monkeypatch):
    monkeypatch.setattr(mm, "supports_fp8_compute", lambda device=None: True)
    model = ComfyModel(quantised_model(name, way), TinyClip(name))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(name, model, True))
    shape, prompt = model.denoiser.latent_shape(64, 64), model.text_encoder.encode(["a fox"])[0]
    assert model.memory.trace_student(config_of(name), shape, 1, True, prompt).peak_bytes > 0


def computed(name: str, model: ComfyModel, checkpointing: bool) -> tracing.Traced:
    """The student's forward and backward pass for a row, counted while it is computed."""
    adapter = randomised(Adapter(config_of(name)))
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(1, *model.denoiser.latent_shape(64, 64))
    with model.denoiser.session(checkpointing=checkpointing):
        conds = model.denoiser.conditions(model.text_encoder.encode(["a fox"]), x.shape)

        def evaluate() -> torch.Tensor:  # as training does: the step ends with the evaluation
            options = with_adapter(model.denoiser._options, adapter, torch.full((1,), 4.0), conds, conds)
            return model.denoiser.evaluate(x, torch.ones(1), conds, options)

        with tracing.Counter() as counter:
            (evaluate() - x).square().mean().backward()
    return counter.traced()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd3", "wan2.1-t2v"])
@pytest.mark.parametrize("way", ["fp8-scaled", "int8"])
def test_the_copies_that_layers_unpack_are_planned(name, way, checkpointing):
    model, plain = ComfyModel(quantised_model(name, way), TinyClip(name)), ComfyModel(tiny_model(name), TinyClip(name))
    real, (prompt,) = computed(name, model, checkpointing), plain.text_encoder.encode(["a fox"])
    costs = config_of(name), model.denoiser.latent_shape(64, 64), 1, checkpointing, prompt
    found = model.memory.trace_student(*costs)
    assert found.flops == real.flops
    assert found.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    # Kept for the backward pass, or of one block of two at a time.
    unpacked = sum(weight.nbytes for weight in blocks_linears(plain)) / (2 if checkpointing else 1)
    assert 0.6 * unpacked < found.peak_bytes - plain.memory.trace_student(*costs).peak_bytes


def blocks_linears(model: ComfyModel) -> list[torch.Tensor]:
    network = model._model.model.diffusion_model
    layers = [f"{layer.path}.{linear.path}" for layer in model.base.layers for linear in layer.linears]
    return [network.get_submodule(layer).weight for layer in layers]


@each
def test_after_training_in_comfyui_the_base_is_moved_and_sampled_as_before(name, way):
    base = quantised_model(name, way)
    before = sample(name, base)
    with torch.inference_mode():  # as nodes run
        with ComfyModel(base, TinyClip(name)).denoiser.session():
            pass
        mm.unload_all_models()
        assert torch.equal(sample(name, base), before)


@each
def test_a_short_training_learns(name, way):
    model = ComfyModel(quantised_model(name, way), TinyClip(name))
    settings = {"iterations": 80, "held_out": 0, "width": 64, "height": 64, "batch": 2, "steps_min": 3, "steps_max": 4}
    settings |= {"vector": 8, "encoder_width": 8, "learning_rate": 1e-3, "preview_every": 0, "evaluate_every": 0}
    trained = train(model, PROMPTS, settings_for(model.base, settings), options=RunOptions(negative=["", "dark"]))
    assert sum(trained.losses[-10:]) < 0.9 * sum(trained.losses[:10])


@each
def test_what_is_made_of_a_prompt_is_nearly_what_the_exact_weights_make_of_it(name, way):
    step = GuidedStep((ActiveAdapter(Adapter(config_of(name, "delta", rank=0)), torch.ones(1), torch.ones(1)),))
    x, found = empty_latent(name)["samples"], []
    for base in (quantised_model(name, way), tiny_model(name)):
        model, denoiser = base.model, ComfyModel(base, TinyClip(name)).denoiser
        conds = denoiser.conditions(ComfyModel(base, TinyClip(name)).text_encoder.encode(["dark"]), x.shape)
        with denoiser.session(), torch.no_grad():
            found.append(dict(backbone_of(model).keys_values(model, conds, x, step)))
    assert found[0].keys() == found[1].keys() == {layer.name for layer in base_of(name).layers if layer.reads_prompt}
    for layer, kept in found[0].items():
        exact = found[1][layer]
        assert 0 < max(relative(kept.keys, exact.keys), relative(kept.values, exact.values)) < 0.15


@each
def test_a_lora_of_others_on_top_changes_the_guided_picture_as_on_the_exact_weights(name, way):
    changed = []
    for base in (quantised_model(name, way), tiny_model(name)):
        with_lora = comfy.sd.load_lora_for_models(base, None, lora_of(name), 1.0, 0.0)[0]
        assert len(with_lora.patches) == sum(len(layer.linears) for layer in base_of(name).layers)
        model = adapted(name, with_lora)
        changed.append(sample(name, model))
        assert not torch.allclose(changed[-1], sample(name, adapted(name, base)))
    assert relative(*changed) < 0.3


def lora_of(name: str) -> dict[str, torch.Tensor]:
    """A LoRA of rank 1 for all linear layers of the blocks."""
    generator, weights = torch.Generator().manual_seed(1), {}
    for layer in base_of(name).layers:
        for linear in layer.linears:
            key = f"diffusion_model.{layer.path}.{linear.path}"
            weights[f"{key}.lora_up.weight"] = torch.randn(linear.outputs, 1, generator=generator) / linear.outputs**0.5
            weights[f"{key}.lora_down.weight"] = torch.randn(1, linear.inputs, generator=generator) / linear.inputs**0.5
    return weights

"""What a training of every transformer family takes, counted without computing it."""

import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.model import tracing
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.denoiser import with_adapter
from comfyui_agd.agd_core.comfyui.model.text_encoder import EncodedPrompt
from comfyui_agd.tests.support.family_adapters import TinyClip, base_of, config_of
from comfyui_agd.tests.support.small import randomised
from comfyui_agd.tests.support.tiny_families import TINY_FAMILIES, tiny_model
from comfyui_agd.training.plan import ExamplePrompts, plan
from comfyui_agd.training.presets import settings_for

ROWS = 2


def model_of(name: str) -> ComfyModel:
    return ComfyModel(tiny_model(name), TinyClip(name))


def prompt_of(model: ComfyModel) -> EncodedPrompt:
    return model.text_encoder.encode(["a fox"])[0]


def computed(model: ComfyModel, name: str, shape: tuple[int, ...]) -> tracing.Traced:
    """The student's forward and backward pass, counted while it is computed."""
    adapter = randomised(Adapter(config_of(name)))
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(ROWS, *shape)
    conds = model.denoiser.conditions([prompt_of(model)] * ROWS, x.shape)
    options = with_adapter(model.denoiser._options, adapter, torch.full((ROWS,), 4.0), conds, conds)
    with tracing.Counter() as counter:
        (model.denoiser.evaluate(x, torch.ones(ROWS), conds, options) - x).square().mean().backward()
    return counter.traced()


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_the_student_costs_what_it_costs_when_it_is_computed(name):
    model = model_of(name)
    shape = model.denoiser.latent_shape(*([512] * 2 if name == "pixart" else [64] * 2))
    with model.denoiser.session(checkpointing=True):
        real = computed(model, name, shape)
    found = model.memory.trace_student(config_of(name), shape, ROWS, True, prompt_of(model))
    assert found.flops == real.flops
    assert found.peak_bytes == pytest.approx(real.peak_bytes, rel=0.001)


def test_a_training_of_routed_experts_is_planned_for_a_device_with_little_memory():
    model, config = model_of("hidream"), settings_for(base_of("hidream"), {"width": 128, "height": 128, "hidden": 2})
    prompts = ExamplePrompts(prompt_of(model), prompt_of(model))
    whole = plan(model, config, None, prompts)
    assert plan(model, config, int(0.7 * whole.peak_bytes), prompts).peak_bytes <= 0.7 * whole.peak_bytes

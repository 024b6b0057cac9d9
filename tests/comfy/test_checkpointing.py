"""Activation checkpointing changes what a training step keeps in memory, and nothing else."""

from contextlib import nullcontext

import comfy.ops
import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones.unet import UNet
from comfyui_agd.agd_core.comfyui.guided_step import with_step
from comfyui_agd.agd_core.comfyui.model import activation_checkpointing, denoiser
from comfyui_agd.agd_core.comfyui.model.activation_checkpointing import checkpointed
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.tests.support.runtime import TinyUNet, TwoWidths, tiny
from comfyui_agd.tests.support.small import info_for, randomised

PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture(params=[TinyUNet, TwoWidths], ids=lambda config: config.__name__)
def model(request, toy):
    return ComfyModel(tiny(request.param()), toy.clip)


def new_adapter(model, kind: str = "cross_attention") -> Adapter:
    config = info_for(model.base, kind, hidden=8, encoder_width=8, prompt_tokens=16).config
    torch.manual_seed(0)
    return randomised(Adapter(config))


def step_of(model, adapter: Adapter) -> list[torch.Tensor]:
    """The student's output and the gradient of every parameter."""
    generator, prompts = torch.Generator().manual_seed(1), model.text_encoder.encode(PROMPTS)
    x = torch.randn(2, *model.denoiser.latent_shape(64, 64), generator=generator)
    denoised = model.denoiser.student(
        adapter, x, torch.tensor([5.0, 1.0]), prompts, prompts[::-1], torch.tensor([2.0, 7.0])
    )
    denoised.square().mean().backward()
    return [denoised.detach(), *[parameter.grad for _, parameter in adapter.trained()]]


def unet_of(model):
    return model._model.model.diffusion_model


def test_outputs_and_gradients_are_the_same_to_the_bit(model):
    for kind in KINDS:
        with model.denoiser.session():
            expected = step_of(model, new_adapter(model, kind))
            with checkpointed(UNet(unet_of(model))):
                found = step_of(model, new_adapter(model, kind))
        assert all(gradient.abs().max() > 0 for gradient in expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert not any(module._forward_hooks for module in unet_of(model).modules())


def with_other_prompt_from_the_second_layer_on(model) -> None:
    """As packs that bring an image as a prompt do; `Adapter.add` prepares its keys and values again there."""
    seen, other = [], torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(2))

    def replace_context(n, context, value, extra_options):
        seen.append(extra_options["block"])
        return (n, context, value) if extra_options["block"] == seen[0] else (n, other, other)

    model._model.set_model_attn2_patch(replace_context)


def test_a_prompt_that_changes_on_the_way_is_the_same_in_the_recomputation(toy):
    model = ComfyModel(tiny(TinyUNet()), toy.clip)
    with_other_prompt_from_the_second_layer_on(model)
    with model.denoiser.session():
        expected = step_of(model, new_adapter(model))
        with checkpointed(UNet(unet_of(model))):
            found = step_of(model, new_adapter(model))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class OneBuffer:
    """Casts weights as ComfyUI does those in system memory on a GPU: into memory that the next layer uses again."""

    def __init__(self):
        self.memory = torch.empty(0)

    def __call__(self, layer, input=None, offloadable=False, **_):
        sizes = [layer.weight.numel(), 0 if layer.bias is None else layer.bias.numel()]
        self.memory = torch.empty(sum(sizes)) if self.memory.numel() < sum(sizes) else self.memory
        # New tensors on the same memory: autograd does not see that others are written there.
        weight, bias = (part.detach() for part in self.memory.data[: sum(sizes)].split(sizes))
        weight.data.copy_(layer.weight.flatten())
        if layer.bias is not None:
            bias.data.copy_(layer.bias)
        bias = None if layer.bias is None else bias
        return (weight.view(layer.weight.shape), bias, None) if offloadable else (weight.view(layer.weight.shape), bias)


@pytest.mark.parametrize("on", [False, True])
def test_layers_in_system_memory_find_their_own_weights_in_the_backward_pass(model, monkeypatch, on):
    with model.denoiser.session():
        expected = step_of(model, new_adapter(model))
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", OneBuffer())
        monkeypatch.setattr(activation_checkpointing, "_borrows_weights", lambda layer, x: on)
        for layer in unet_of(model).modules():
            if isinstance(layer, comfy.ops.CastWeightBiasOp):
                layer.comfy_cast_weights = True
        with checkpointed(UNet(unet_of(model))):
            found = step_of(model, new_adapter(model))
    assert torch.equal(found[0], expected[0])
    same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert same == on


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_in_the_model(model, fails):
    unet, seen = unet_of(model), []
    before = [dict(vars(module)) for module in unet.modules()]
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), checkpointed(UNet(unet)):
        seen = [module for module in unet.modules() if "forward" in vars(module)]
        if fails:
            raise ZeroDivisionError
    assert len(seen) > len(model.base.layers)  # residual blocks and transformer blocks
    assert [dict(vars(module)) for module in unet.modules()] == before


def test_a_forward_that_was_there_before_is_used_and_kept(model):
    unet, calls = unet_of(model), []
    block = unet.middle_block[0]
    real = block.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    block.forward = forward
    try:
        with model.denoiser.session(), checkpointed(UNet(unet)):
            step_of(model, new_adapter(model))
        assert len(calls) == 2  # forward, and again in the backward pass
        assert vars(block)["forward"] is forward
    finally:
        del block.forward


def test_without_gradients_nothing_changes(model):
    x, sigma, prompts = (
        torch.randn(2, *model.denoiser.latent_shape(64, 64)),
        torch.ones(2),
        model.text_encoder.encode(PROMPTS),
    )
    with model.denoiser.session():
        expected = model.denoiser.denoise(x, sigma, prompts)
        with checkpointed(UNet(unet_of(model))):
            assert torch.equal(model.denoiser.denoise(x, sigma, prompts), expected)


def test_the_recomputation_visits_every_layer_once_more(model, monkeypatch):
    steps = []

    def spy(options, step):
        steps.append(step)
        return with_step(options, step)

    monkeypatch.setattr(denoiser, "with_step", spy)
    with model.denoiser.session(), checkpointed(UNet(unet_of(model))):
        step_of(model, new_adapter(model))
    (step,) = steps
    assert step.visited == step.layer_names() + step.layer_names()[::-1]

"""Gradient checkpointing changes what a training step keeps in memory, and nothing else."""

from contextlib import nullcontext

import comfy.ops
import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones.unet import UNet
from comfyui_agd.agd_core.comfyui.model import activation_checkpointing
from comfyui_agd.agd_core.comfyui.model import host as host_module
from comfyui_agd.agd_core.comfyui.model.activation_checkpointing import checkpointed
from comfyui_agd.agd_core.comfyui.model.host import ComfyHost
from comfyui_agd.agd_core.comfyui.step import with_step
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.tests.support.runtime import TinyUNet, TwoWidths, tiny
from comfyui_agd.tests.support.small import config_for, randomised

PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture(params=[TinyUNet, TwoWidths], ids=lambda config: config.__name__)
def host(request, toy):
    return ComfyHost(tiny(request.param()), toy.clip)


def new_adapter(host, kind: str = "cross_attention") -> Adapter:
    config = config_for(host.base.layers, kind, hidden=8, encoder_width=8, prompt_tokens=16)
    torch.manual_seed(0)
    return randomised(Adapter(config))


def step_of(host, adapter: Adapter) -> list[torch.Tensor]:
    """The student's output and the gradient of every parameter."""
    generator, prompts = torch.Generator().manual_seed(1), host.encode(PROMPTS)
    x = torch.randn(2, *host.latent_shape(64, 64), generator=generator)
    denoised = host.student(adapter, x, torch.tensor([5.0, 1.0]), prompts, prompts[::-1], torch.tensor([2.0, 7.0]))
    denoised.square().mean().backward()
    return [denoised.detach(), *[parameter.grad for _, parameter in adapter.trained()]]


def unet_of(host):
    return host._model.model.diffusion_model


def test_outputs_and_gradients_are_the_same_to_the_bit(host):
    for kind in KINDS:
        with host.session():
            expected = step_of(host, new_adapter(host, kind))
            with checkpointed(UNet(unet_of(host))):
                found = step_of(host, new_adapter(host, kind))
        assert all(gradient.abs().max() > 0 for gradient in expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert not any(module._forward_hooks for module in unet_of(host).modules())


def with_other_prompt_from_the_second_site_on(host) -> None:
    """As packs that bring an image as a prompt do; `Adapter.add` prepares its keys and values again there."""
    seen, other = [], torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(2))

    def replace_context(n, context, value, extra_options):
        seen.append(extra_options["block"])
        return (n, context, value) if extra_options["block"] == seen[0] else (n, other, other)

    host._model.set_model_attn2_patch(replace_context)


def test_a_prompt_that_changes_on_the_way_is_the_same_in_the_recomputation(toy):
    host = ComfyHost(tiny(TinyUNet()), toy.clip)
    with_other_prompt_from_the_second_site_on(host)
    with host.session():
        expected = step_of(host, new_adapter(host))
        with checkpointed(UNet(unet_of(host))):
            found = step_of(host, new_adapter(host))
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
def test_layers_in_system_memory_find_their_own_weights_in_the_backward_pass(host, monkeypatch, on):
    with host.session():
        expected = step_of(host, new_adapter(host))
        monkeypatch.setattr(comfy.ops, "cast_bias_weight", OneBuffer())
        monkeypatch.setattr(activation_checkpointing, "_borrows_weights", lambda layer, x: on)
        for layer in unet_of(host).modules():
            if isinstance(layer, comfy.ops.CastWeightBiasOp):
                layer.comfy_cast_weights = True
        with checkpointed(UNet(unet_of(host))):
            found = step_of(host, new_adapter(host))
    assert torch.equal(found[0], expected[0])
    same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert same == on


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_in_the_model(host, fails):
    unet, seen = unet_of(host), []
    before = [dict(vars(module)) for module in unet.modules()]
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), checkpointed(UNet(unet)):
        seen = [module for module in unet.modules() if "forward" in vars(module)]
        if fails:
            raise ZeroDivisionError
    assert len(seen) > len(host.base.layers)  # residual blocks and transformer blocks
    assert [dict(vars(module)) for module in unet.modules()] == before


def test_a_forward_that_was_there_before_is_used_and_kept(host):
    unet, calls = unet_of(host), []
    block = unet.middle_block[0]
    real = block.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    block.forward = forward
    try:
        with host.session(), checkpointed(UNet(unet)):
            step_of(host, new_adapter(host))
        assert len(calls) == 2  # forward, and again in the backward pass
        assert vars(block)["forward"] is forward
    finally:
        del block.forward


def test_without_gradients_nothing_changes(host):
    x, sigma, prompts = torch.randn(2, *host.latent_shape(64, 64)), torch.ones(2), host.encode(PROMPTS)
    with host.session():
        expected = host.denoise(x, sigma, prompts)
        with checkpointed(UNet(unet_of(host))):
            assert torch.equal(host.denoise(x, sigma, prompts), expected)


def test_the_recomputation_visits_every_site_once_more(host, monkeypatch):
    steps = []

    def spy(options, step):
        steps.append(step)
        return with_step(options, step)

    monkeypatch.setattr(host_module, "with_step", spy)
    with host.session(), checkpointed(UNet(unet_of(host))):
        step_of(host, new_adapter(host))
    (step,) = steps
    assert step.visited == step.layer_names() + step.layer_names()[::-1]

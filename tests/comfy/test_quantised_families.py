"""Adapters of transformers whose weights are quantised: low-rank changes stay beside the layers."""

import json
import re
from collections.abc import Callable

import comfy.ops
import pytest
import torch
from torch import nn

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones import backbone_of
from comfyui_agd.agd_core.comfyui.backbones.linears import LinearHook
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.families import find_family
from comfyui_agd.tests.support.family_adapters import TinyClip, adapted, config_of
from comfyui_agd.tests.support.runtime import STEPS, Prompts, ksampler, rows_of, since
from comfyui_agd.tests.support.small import randomised
from comfyui_agd.tests.support.tiny_families import TINY_FAMILIES, conditioning, empty_latent, flat, tiny_model

NAMES = ("sd3", "flux", "z-image", "qwen-image", "wan2.1-t2v")


def in_blocks(name: str) -> re.Pattern:
    """The keys of the blocks' linear layers."""
    return re.compile(rf"({'|'.join(map(re.escape, find_family(TINY_FAMILIES[name].family).blocks))})\.\d+\..*\.weight")


def quantised(name: str, kind: str, dtype: torch.dtype, largest: int) -> Callable[[dict], dict]:
    """Weights of the blocks' linear layers with a scale of their own, as ComfyUI stores them."""

    def stored(state: dict[str, torch.Tensor]) -> dict:
        how, found = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8), dict(state)
        for key, weight in state.items():
            if in_blocks(name).fullmatch(key) and weight.ndim == 2:
                scale, layer = weight.abs().max() / largest, key.removesuffix(".weight")
                scaled = weight / scale
                found[key] = (scaled if dtype.is_floating_point else scaled.round()).to(dtype)
                found |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": how.clone()}
        return found

    return stored


class Packed(nn.Parameter):
    """A pack's own class of weights, which says the dtype that they are computed in."""


class UnpackingLinear(comfy.ops.disable_weight_init.Linear):
    """A pack's own layer, which unpacks its weights when it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale, self.bias)


def packed(name: str):
    """The model as such a pack builds it."""
    model = tiny_model(name)
    for block in backbone_of(model.model).blocks().values():
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.scale = layer.weight.abs().max() / 127
                layer.packed = (layer.weight / layer.scale).round().to(torch.int8)
                layer.weight = Packed(layer.weight.data, requires_grad=False)
                layer.__class__ = UnpackingLinear
    return model


@torch.inference_mode()  # as ComfyUI's nodes load them
def by_layer(name: str, *how):
    return tiny_model(name, quantised(name, *how))


MODELS = {
    "fp8": lambda name: tiny_model(name, dtype=torch.float8_e4m3fn),
    "scaled fp8": lambda name: by_layer(name, "float8_e4m3fn", torch.float8_e4m3fn, 448),
    "int8": lambda name: by_layer(name, "int8_tensorwise", torch.int8, 127),
    "packed": packed,
}
every = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in NAMES for kind in MODELS])


def sample(name: str, model, **options) -> torch.Tensor:
    given = Prompts(conditioning(name, "a fox"), conditioning(name, "dark"))
    return flat(ksampler(model, given, at=empty_latent(name), **options))


def rows(name: str, model) -> list[int]:
    return rows_of(model, lambda counted: sample(name, counted))


@pytest.fixture
def hooked(monkeypatch) -> list:
    """The low-rank changes that ran beside their layers."""
    seen, call = [], LinearHook.__call__

    def watched(self, *args):
        seen.append(self.path)
        return call(self, *args)

    monkeypatch.setattr(LinearHook, "__call__", watched)
    return seen


@every
def test_changes_run_beside_the_layers_and_guide_as_on_the_exact_weights(name, kind, hooked):
    since("0.30.0")
    base, exact = MODELS[kind](name), tiny_model(name)
    model = adapted(name, base)
    guided = sample(name, model)
    assert hooked
    assert rows(name, model)[-STEPS:] == [1] * STEPS
    own = sample(name, base, cfg=1.0)
    rounding = (own - sample(name, exact, cfg=1.0)).norm() / own.norm()
    assert (guided - sample(name, adapted(name, exact))).norm() / guided.norm() < max(3 * rounding, 1e-3)
    assert (guided - own).norm() / own.norm() > 0.05


@every
def test_where_there_is_nothing_to_do_the_picture_is_the_quantised_bases_to_the_bit(name, kind):
    since("0.30.0")
    base = MODELS[kind](name)
    assert torch.equal(sample(name, adapted(name, base), cfg=1.0), sample(name, base, cfg=1.0))
    assert torch.equal(sample(name, adapted(name, base, strength=0.0)), sample(name, base))


@every
def test_a_training_step_has_gradients_for_every_parameter(name, kind):
    since("0.30.0")
    model = ComfyModel(MODELS[kind](name), TinyClip(name))
    denoiser, adapter = model.denoiser, randomised(Adapter(config_of(name)))
    x = torch.randn(1, *denoiser.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    positive, negative = (model.text_encoder.encode([text]) for text in ("a fox", "dark"))
    sigma = denoiser.sigmas("simple", 4)[1:2]
    with denoiser.session(checkpointing=True):
        out = denoiser.student(adapter, x, sigma, positive, negative, torch.tensor([3.0]))
        out.square().mean().backward()
    assert [key for key, parameter in adapter.trained() if parameter.grad is None or not parameter.grad.any()] == []

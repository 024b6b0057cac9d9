"""ControlNets of the tiny families, with random weights: by ComfyUI's loaders, or in a MODEL by its nodes."""

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import comfy.cldm.dit_embedder
import comfy.cldm.mmdit
import comfy.controlnet
import comfy.ldm.flux.controlnet
import comfy.ldm.hydit.controlnet
import comfy.ldm.qwen_image.controlnet
import comfy.model_patcher
import comfy.ops
import comfy.utils
import nodes
import pytest
import torch
from comfy_extras import nodes_model_patch
from torch import nn

from .runtime import Prompts
from .tiny_families import TINY_FAMILIES, random_weights, replaced_sizes

OPS = comfy.ops.disable_weight_init
CPU = torch.device("cpu")
PICTURE = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(2))


def vae(channels: int, frames: bool = False) -> Any:
    """What stands for a VAE: a latent pixel is the mean of its part of the picture, in random shares by channel.

    `frames`: the pictures are those of one video, and every fourth of them is in the latent.
    """
    shares = torch.randn(channels, 3, generator=torch.Generator().manual_seed(0))

    def encode(picture: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(picture[..., :3].movedim(-1, 1), 8)
        latent = torch.einsum("nchw,dc->ndhw", small - 0.5, shares)
        return latent[::4].movedim(0, 1)[None] if frames else latent

    return types.SimpleNamespace(
        encode=encode, spacial_compression_encode=lambda: 8, temporal_compression_decode=lambda: 4
    )


def _weights(network: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return random_weights(network.state_dict(), name)


def _as_diffusers(weights: dict[str, torch.Tensor], names: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`names`: ComfyUI's, by those of the file, with the part of the tensor where it is one of several."""
    found, used = {}, set()
    for theirs, ours in names.items():
        key, part, *_ = (ours, None) if isinstance(ours, str) else ours
        if key in weights and theirs not in found:
            found[theirs] = weights[key] if part is None else weights[key].narrow(*part).clone()
            used.add(key)
    return {**{key: weight for key, weight in weights.items() if key not in used}, **found}


def _sd3() -> dict[str, torch.Tensor]:
    how = {"num_blocks": 1, "control_latent_channels": 16, "device": "meta", "operations": OPS}
    network = comfy.cldm.mmdit.ControlNet(**how, **TINY_FAMILIES["sd3"].config)
    names = comfy.utils.mmdit_to_diffusers({"depth": 2, "num_blocks": 1})
    return _as_diffusers(_weights(network, "SD3's"), names)


_SD35 = {"img_size": None, "patch_size": 2, "in_chans": 16, "num_layers": 1, "main_model_double": 2}
_SD35 |= {"double_y_emb": False, "attention_head_dim": 64, "num_attention_heads": 2}


def _sd35() -> dict[str, torch.Tensor]:
    made = comfy.cldm.dit_embedder.ControlNetEmbedder
    return _weights(made(**{**_SD35, "adm_in_channels": 32}, device="meta", dtype=None, operations=OPS), "SD3.5's")


@contextlib.contextmanager
def _small_sd35() -> Iterator[None]:
    """ComfyUI takes the width of the pooled prompt for granted."""
    made = comfy.cldm.dit_embedder.ControlNetEmbedder

    def small(**sizes):
        return made(**{**sizes, "adm_in_channels": 32})

    with mock.patch.object(comfy.cldm.dit_embedder, "ControlNetEmbedder", small):
        yield


def _flux(**how) -> nn.Module:
    made = comfy.ldm.flux.controlnet.ControlNetFlux
    return made(device="meta", operations=OPS, **how, **TINY_FAMILIES["flux"].config)


def _flux_xlabs() -> dict[str, torch.Tensor]:
    weights = _weights(_flux(), "XLabs'")
    return {key.replace("_norm.weight", "_norm.scale"): weight for key, weight in weights.items()}


def _flux_instantx() -> dict[str, torch.Tensor]:
    weights = _weights(_flux(latent_input=True, control_latent_channels=16), "InstantX'")
    names = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 128})
    return _as_diffusers(weights, names)


def _qwen_instantx() -> dict[str, torch.Tensor]:
    made = comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel
    return _weights(made(device="meta", operations=OPS, **TINY_FAMILIES["qwen-image"].config), "Qwen's")


def _qwen_fun() -> dict[str, torch.Tensor]:
    made = comfy.ldm.qwen_image.controlnet.QwenImageFunControlNetModel
    sizes = {"inner_dim": 128, "num_attention_heads": 2, "attention_head_dim": 64}
    return _weights(made(device="meta", operations=OPS, **sizes), "Qwen's Fun")


_HunYuanControlNet = comfy.ldm.hydit.controlnet.HunYuanControlNet


def _small_hunyuan(**how) -> nn.Module:
    return _HunYuanControlNet(**how, **TINY_FAMILIES["hunyuan-dit"].config)


def _hunyuan_dit() -> dict[str, torch.Tensor]:
    return _weights(_small_hunyuan(device="meta", operations=OPS), "Hunyuan-DiT's")


@dataclass(frozen=True)
class TinyControl:
    """`weights`: as in a file; `vae`: that its hints come through, if they do; `smaller`: as of a tiny family; `cut`:
    to so many blocks, once loaded, where ComfyUI has as many as the true model needs."""

    family: str
    weights: Callable[[], dict[str, torch.Tensor]]
    vae: Any = None
    smaller: Any = contextlib.nullcontext
    cut: int | None = None


TINY_CONTROLS = {
    "sd3": TinyControl("sd3", _sd3, vae(16)),
    "sd3.5": TinyControl("sd3.5-medium", _sd35, vae(16), _small_sd35),
    "flux, XLabs": TinyControl("flux", _flux_xlabs),
    "flux, InstantX": TinyControl("flux", _flux_instantx, vae(16)),
    "qwen-image, InstantX": TinyControl("qwen-image", _qwen_instantx, vae(16, frames=True)),
    "qwen-image, Fun": TinyControl("qwen-image", _qwen_fun, vae(16, frames=True)),
    "hunyuan-dit": TinyControl(
        "hunyuan-dit",
        _hunyuan_dit,
        vae(4),
        lambda: mock.patch.object(comfy.ldm.hydit.controlnet, "HunYuanControlNet", _small_hunyuan),
        cut=1,
    ),
}


@contextlib.contextmanager
def _skipped_where_there_is_none(name: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, ImportError):
        pytest.skip(f"this ComfyUI has no ControlNet for {name}")


def tiny_control(name: str) -> comfy.controlnet.ControlNet:
    """A fresh one each time, always with the same weights."""
    row = TINY_CONTROLS[name]
    with replaced_sizes(TINY_FAMILIES[row.family]), row.smaller(), _skipped_where_there_is_none(name):
        control = comfy.controlnet.load_controlnet_state_dict(row.weights())
    if row.cut is not None:
        network = control.control_model
        network.blocks, network.after_proj_list = network.blocks[: row.cut], network.after_proj_list[: row.cut]
    return control


def controlled(name: str, given: Prompts, strength: float = 1.0, control=None) -> Prompts:
    """The prompts with a ControlNet on both, by default a fresh one of that name."""
    apply = nodes.ControlNetApplyAdvanced().apply_controlnet
    control = control or tiny_control(name)
    return Prompts(
        *apply(given.positive, given.negative, control, PICTURE, strength, 0.0, 1.0, TINY_CONTROLS[name].vae)
    )


# Those that ComfyUI's nodes put into a MODEL.


def _loaded(network: nn.Module, name: str) -> comfy.model_patcher.ModelPatcher:
    network.load_state_dict(_weights(network, name))
    return comfy.model_patcher.CoreModelPatcher(network, load_device=CPU, offload_device=CPU)


def _diffsynth(model):
    network = nodes_model_patch.QwenImageBlockWiseControlNet(num_layers=2, dim=128, operations=OPS)
    node = nodes_model_patch.QwenImageDiffsynthControlnet()
    return node.diffsynth_controlnet(model, _loaded(network, "DiffSynth's"), vae(16, frames=True), PICTURE)[0]


def _z_image_fun(model):
    import comfy.ldm.lumina.controlnet

    sizes = {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "multiple_of": 32}
    network = comfy.ldm.lumina.controlnet.ZImage_Control(operations=OPS, **sizes)
    node = nodes_model_patch.ZImageFunControlnet()
    return node.diffsynth_controlnet(model, _loaded(network, "Z-Image's Fun"), vae(16), PICTURE)[0]


def _lllite(model):
    import comfy.ldm.anima.lllite as lllite

    parts = {"lllite_conditioning1": lllite.AnimaLLLiteConditioning(3, 32, 16, 1, (), operations=OPS)}
    for target in ("self_attn_q_proj", "cross_attn_q_proj", "mlp_layer1"):
        parts[f"lllite_dit_blocks_0_{target}"] = lllite.AnimaLLLiteModule(128, 16, 8, operations=OPS)
    weights = nn.ModuleDict(parts).state_dict()
    network = lllite.AnimaLLLite(weights, {}, operations=OPS)
    return nodes_model_patch.AnimaLLLiteApply().apply_patch(model, _loaded(network, "LLLite"), PICTURE, 1.0, 0.0, 1.0)[
        0
    ]


def _uni3c(model):
    import comfy.ldm.wan.uni3c

    sizes = {"conv_out_dim": 64, "dim": 64, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "mid_channels": 8}
    sizes |= {"time_embed_dim": 128, "out_proj_dim": 128}
    network = comfy.ldm.wan.uni3c.WanUni3CControlnet(operations=OPS, **sizes)
    node = nodes_model_patch.WanUni3CControlnetApply()
    video = PICTURE.expand(5, -1, -1, -1)
    return node.apply_patch(model, _loaded(network, "Uni3C"), vae(16, frames=True), video, 1.0, 0.0, 1.0)[0]


CONTROL_PATCHES = {"qwen-image": _diffsynth, "z-image": _z_image_fun, "anima": _lllite, "wan2.1-t2v": _uni3c}


def with_control_patch(family: str, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """`model` with the family's ControlNet in it."""
    with _skipped_where_there_is_none(family):
        return CONTROL_PATCHES[family](model)

"""A tiny random model of every transformer family that people run with CFG, in the true layout of its files.

The state dict comes from ComfyUI's own network class with small sizes, and is loaded as any file's is, so that ComfyUI
detects the family by itself. It takes some sizes for granted (a Z-Image is 3840 wide), which are then replaced.
"""

import contextlib
import functools
import importlib
import math
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import comfy.model_detection
import comfy.model_patcher
import comfy.nested_tensor
import comfy.ops
import comfy.sd
import pytest
import torch


@dataclass(frozen=True)
class TinyFamily:
    """A row.

    `family`: ComfyUI's class of the model's configuration, which it is to be detected as. `network`: of the network in
    comfy.ldm, and `config` its arguments; those that ComfyUI doesn't read from the weights are named in `assumed`.
    `marks`: true sizes by which it tells the family; the network has others.

    `latent`: [c, (frames,) h, w], or several for a model of several. `width`: of the prompt's tokens; `tokens`: how
    many a prompt has, where the text encoder pads all prompts alike; otherwise it is as long as its words. `pooled`:
    the width of the prompt's vector. `masked`: prompts come with an attention mask, which hides the padding.
    `extras`: what else a prompt has, of (random generator, number of tokens). `smaller`: a context in which the
    network can be made small at all.
    """

    family: str
    network: str
    config: dict
    latent: tuple
    width: int
    tokens: int | None = 8
    pooled: int | None = None
    masked: bool = False
    extras: Any = lambda generator, tokens: {}
    assumed: tuple[str, ...] = ()
    marks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    smaller: Any = contextlib.nullcontext


def _t5_of_hunyuan_dit(generator: torch.Generator, tokens: int) -> dict:
    t5 = torch.randn(1, tokens, 32, generator=generator)
    return {"conditioning_mt5xl": t5, "attention_mask_mt5xl": torch.ones(1, tokens)}


def _llama_of_hidream(generator: torch.Generator, tokens: int) -> dict:
    """Of each of its layers; as many tokens as it likes."""
    return {"conditioning_llama3": torch.randn(1, 4, tokens + 3, 48, generator=generator)}


def _t5_ids_of_anima(generator: torch.Generator, tokens: int) -> dict:
    ids = torch.randint(0, 32128, (tokens,), generator=generator, dtype=torch.int32)
    return {"t5xxl_ids": ids, "t5xxl_weights": torch.ones(tokens)}


def _image_of_wan(generator: torch.Generator, tokens: int) -> dict:
    """The picture that the video starts with, the same for every prompt."""
    seen = torch.randn(1, 5, 1280, generator=torch.Generator().manual_seed(1))
    return {"clip_vision_output": types.SimpleNamespace(penultimate_hidden_states=seen)}


def _byt5_of_hunyuan(generator: torch.Generator, tokens: int) -> dict:
    """The letters that the prompt wants written."""
    return {"conditioning_byt5small": torch.randn(1, 3, 1472, generator=generator)}


@contextlib.contextmanager
def _small_anima() -> Iterator[None]:
    """Its text adapter has no sizes to choose."""
    import comfy.ldm.anima.model as anima

    sizes = {"source_dim": 48, "target_dim": 32, "model_dim": 32, "num_layers": 1, "num_heads": 2}
    with mock.patch.object(anima, "LLMAdapter", functools.partial(anima.LLMAdapter, **sizes)):
        yield


_SD3 = {
    "input_size": None,
    "in_channels": 16,
    "out_channels": 16,
    "depth": 2,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
    "num_patches": 256,
    "pos_embed_max_size": 16,
}
_FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 48,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 24, 24],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
_FLUX_2 = {
    **_FLUX,
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [16, 16, 16, 16],
    "patch_size": 1,
    "qkv_bias": False,
    "guidance_embed": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
}
_CHROMA = {key: _FLUX[key] for key in _FLUX if key != "guidance_embed"}
_CHROMA |= {"in_channels": 64, "out_channels": 64, "vec_in_dim": None}
_CHROMA |= {"in_dim": 64, "out_dim": 128, "hidden_dim": 64, "n_layers": 2}
_NEXT_DIT = {
    "in_channels": 16,
    "dim": 128,
    "cap_feat_dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "multiple_of": 32,
}
_LUMINA_2 = {**_NEXT_DIT, "n_kv_heads": 1, "axes_dims": [16, 24, 24], "axes_lens": [300, 512, 512]}
_Z_IMAGE = {**_NEXT_DIT, "dim": 256, "n_heads": 4, "n_kv_heads": 4}
_Z_IMAGE |= {"axes_dims": [16, 24, 24], "axes_lens": [1536, 512, 512]}
_Z_IMAGE |= {"z_image_modulation": True, "pad_tokens_multiple": 32, "ffn_dim_multiplier": 8 / 3, "time_scale": 1000.0}
_NEXT_DIT_ASSUMED = ("dim", "n_refiner_layers", "n_heads", "n_kv_heads", "multiple_of", "axes_dims")
_HUNYUAN_VIDEO = {
    **{key: _FLUX[key] for key in ("hidden_size", "num_heads", "depth", "depth_single_blocks", "mlp_ratio")},
    **{key: _FLUX[key] for key in ("in_channels", "out_channels", "context_in_dim", "qkv_bias", "axes_dim")},
    "vec_in_dim": 768,
    "theta": 256,
    "patch_size": [1, 2, 2],
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
_HUNYUAN_VIDEO_15 = {**_HUNYUAN_VIDEO, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1]}
_HUNYUAN_VIDEO_15 |= {"vec_in_dim": None, "guidance_embed": False, "byt5": True, "use_cond_type_embedding": True}
_HUNYUAN_VIDEO_15 |= {"vision_in_dim": 1152, "meanflow_sum": True}
_WAN = {"dim": 128, "ffn_dim": 256, "num_heads": 2, "num_layers": 2}
_WAN_I2V = {**_WAN, "model_type": "i2v", "in_dim": 36}
_WAN_5B = {**_WAN, "in_dim": 48, "out_dim": 48}
_LTXV = {"cross_attention_dim": 128, "attention_head_dim": 64, "num_attention_heads": 2, "caption_channels": 48}
_LTXV |= {"num_layers": 2}
_LTXAV = {**_LTXV, "audio_cross_attention_dim": 64, "audio_attention_head_dim": 32, "audio_num_attention_heads": 2}
_LTXAV |= {"connector_attention_head_dim": 24, "connector_num_attention_heads": 2, "connector_num_layers": 1}
_HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "caption_channels": [48, 48],
    "text_emb_dim": 32,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [32, 16, 16],
    "max_resolution": [128, 128],
    "llama_layers": [0, 1, 2, 3],
}
_COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 128,
    "num_blocks": 2,
    "num_heads": 2,
    "crossattn_emb_channels": 48,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}
_COSMOS_ASSUMED = ("num_blocks", "num_heads", "crossattn_emb_channels", "adaln_lora_dim")
_OMNIGEN_2 = {
    "hidden_size": 128,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 32,
    "axes_dim_rope": [16, 24, 24],
    "axes_lens": [128, 64, 64],
    "text_feat_dim": 48,
}
_KANDINSKY_5 = {"model_dim": 128, "ff_dim": 256, "time_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2}
_COGVIDEOX = {"num_attention_heads": 2, "time_embed_dim": 64, "text_embed_dim": 48, "num_layers": 2}
_COGVIDEOX |= {"use_rotary_positional_embeddings": True}
_ERNIE = {"hidden_size": 128, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 256, "text_in_dim": 48}
_ERNIE |= {"rope_axes_dim": (16, 24, 24)}
_KREA_2 = {"features": 128, "txtdim": 48, "heads": 2, "kvheads": 1, "layers": 2, "txtlayers": 12}
_KREA_2 |= {"txtheads": 2, "txtkvheads": 2}
_LENS = {"num_layers": 2, "num_attention_heads": 2, "enc_hidden_dim": 24, "selected_layer_index": (0, 1)}
_QWEN = {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 48}
_QWEN |= {"axes_dims_rope": (16, 24, 24)}
_HYDIT = {"hidden_size": 64, "depth": 4, "num_heads": 2, "text_states_dim": 48, "text_states_dim_t5": 32}
_HYDIT |= {"text_len": 8, "text_len_t5": 8}
_PIXART = {"hidden_size": 64, "num_heads": 2, "depth": 2, "caption_channels": 48, "micro_condition": False}
_MMDIT = "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper"
_AURA = {"dim": 128, "n_layers": 4, "n_double_layers": 2, "n_heads": 2, "global_conddim": 128, "max_seq": 64}

TINY_FAMILIES = {
    "sd3": TinyFamily("SD3", _MMDIT, _SD3, (16, 8, 8), 48, pooled=32),
    "sd3.5-medium": TinyFamily(
        "SD3",
        _MMDIT,
        {**_SD3, "qk_norm": "rms", "x_block_self_attn_layers": [0]},
        (16, 8, 8),
        48,
        pooled=32,
    ),
    "auraflow": TinyFamily(
        "AuraFlow", "aura.mmdit.MMDiT", _AURA, (4, 8, 8), 2048, assumed=("dim", "n_heads", "global_conddim")
    ),
    "pixart": TinyFamily(
        "PixArtSigma",
        "pixart.pixartms.PixArtMS",
        _PIXART,
        (4, 40, 40),  # of smaller latents its positions are not finite
        48,
        tokens=None,
        assumed=("hidden_size", "num_heads", "caption_channels"),
    ),
    "hunyuan-dit": TinyFamily(
        "HunyuanDiT",
        "hydit.models.HunYuanDiT",
        _HYDIT,
        (4, 8, 8),
        48,
        masked=True,
        extras=_t5_of_hunyuan_dit,
        assumed=("num_heads", "text_states_dim", "text_states_dim_t5", "text_len", "text_len_t5"),
    ),
    "flux": TinyFamily("Flux", "flux.model.Flux", _FLUX, (16, 8, 8), 48, pooled=32, assumed=("num_heads", "axes_dim")),
    "flux-without-guidance": TinyFamily(
        "FluxSchnell",
        "flux.model.Flux",
        {**_FLUX, "guidance_embed": False},
        (16, 8, 8),
        48,
        pooled=32,
        assumed=("num_heads", "axes_dim"),
    ),
    "chroma": TinyFamily(
        "Chroma",
        "chroma.model.Chroma",
        _CHROMA,
        (16, 8, 8),
        48,
        tokens=None,
        pooled=32,
        assumed=("num_heads", "axes_dim", "out_dim", "hidden_dim", "n_layers"),
    ),
    "flux2": TinyFamily(
        "Flux2", "flux.model.Flux", _FLUX_2, (128, 4, 4), 48, pooled=32, assumed=("num_heads", "axes_dim")
    ),
    "lumina2": TinyFamily(
        "Lumina2",
        "lumina.model.NextDiT",
        _LUMINA_2,
        (16, 8, 8),
        48,
        tokens=None,
        masked=True,
        assumed=_NEXT_DIT_ASSUMED,
        marks={"cap_embedder.1.weight": (2304, 48)},
    ),
    "z-image": TinyFamily(
        "ZImage",
        "lumina.model.NextDiT",
        _Z_IMAGE,
        (16, 8, 8),
        48,
        tokens=None,
        assumed=_NEXT_DIT_ASSUMED,
        marks={"cap_embedder.1.weight": (3840, 48)},
    ),
    "qwen-image": TinyFamily(
        "QwenImage",
        "qwen_image.model.QwenImageTransformer2DModel",
        _QWEN,
        (16, 1, 8, 8),
        48,
        tokens=None,
        assumed=("attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope"),
    ),
    "hunyuan-video": TinyFamily(
        "HunyuanVideo",
        "hunyuan_video.model.HunyuanVideo",
        _HUNYUAN_VIDEO,
        (16, 2, 8, 8),
        48,
        tokens=None,
        pooled=768,
        assumed=("num_heads", "axes_dim"),
    ),
    "hunyuan-video-1.5": TinyFamily(
        "HunyuanVideo15",
        "hunyuan_video.model.HunyuanVideo",
        _HUNYUAN_VIDEO_15,
        (32, 2, 4, 4),
        48,
        tokens=None,
        pooled=768,
        extras=_byt5_of_hunyuan,
        assumed=("num_heads", "axes_dim"),
    ),
    "wan2.1-t2v": TinyFamily("WAN21_T2V", "wan.model.WanModel", _WAN, (16, 2, 8, 8), 4096, assumed=("num_heads",)),
    "wan2.1-i2v": TinyFamily(
        "WAN21_I2V",
        "wan.model.WanModel",
        _WAN_I2V,
        (16, 2, 8, 8),
        4096,
        extras=_image_of_wan,
        assumed=("num_heads",),
    ),
    "wan2.2-5b": TinyFamily("WAN22_T2V", "wan.model.WanModel", _WAN_5B, (48, 2, 8, 8), 4096, assumed=("num_heads",)),
    "ltxv": TinyFamily(
        "LTXV", "lightricks.model.LTXVModel", _LTXV, (128, 2, 4, 4), 48, masked=True, assumed=tuple(_LTXV)
    ),
    "ltx-2": TinyFamily(
        "LTXAV",
        "lightricks.av_model.LTXAVModel",
        _LTXAV,
        ((128, 2, 4, 4), (8, 4, 16)),
        96,
        assumed=tuple(_LTXAV),
    ),
    "hidream": TinyFamily(
        "HiDream",
        "hidream.model.HiDreamImageTransformer2DModel",
        _HIDREAM,
        (16, 8, 8),
        48,
        pooled=32,
        extras=_llama_of_hidream,
        assumed=tuple(_HIDREAM),
    ),
    "cosmos-predict2": TinyFamily(
        "CosmosT2IPredict2",
        "cosmos.predict2.MiniTrainDIT",
        _COSMOS,
        (16, 1, 8, 8),
        48,
        assumed=_COSMOS_ASSUMED,
    ),
    "anima": TinyFamily(
        "Anima",
        "anima.model.Anima",
        {**_COSMOS, "crossattn_emb_channels": 32},
        (16, 1, 8, 8),
        48,
        tokens=None,
        extras=_t5_ids_of_anima,
        assumed=_COSMOS_ASSUMED,
        smaller=_small_anima,
    ),
    "omnigen2": TinyFamily(
        "Omnigen2",
        "omnigen.omnigen2.OmniGen2Transformer2DModel",
        _OMNIGEN_2,
        (16, 8, 8),
        48,
        tokens=None,
        masked=True,
        assumed=tuple(_OMNIGEN_2),
    ),
    "kandinsky5": TinyFamily(
        "Kandinsky5",
        "kandinsky5.model.Kandinsky5",
        _KANDINSKY_5,
        (16, 2, 8, 8),
        3584,
        tokens=None,
        pooled=768,
        masked=True,
    ),
    "cogvideox": TinyFamily(
        "CogVideoX_T2V", "cogvideo.model.CogVideoXTransformer3DModel", _COGVIDEOX, (16, 2, 8, 8), 48
    ),
    "ernie-image": TinyFamily(
        "ErnieImage", "ernie.model.ErnieImageModel", _ERNIE, (128, 4, 4), 48, tokens=None, assumed=tuple(_ERNIE)
    ),
    "krea2": TinyFamily(
        "Krea2",
        "krea2.model.SingleStreamDiT",
        _KREA_2,
        (16, 8, 8),
        576,
        tokens=None,
        assumed=("heads", "kvheads", "txtheads", "txtkvheads"),
    ),
    "lens": TinyFamily("Lens", "lens.model.LensTransformer2DModel", _LENS, (128, 4, 4), 48, tokens=None, masked=True),
}


def _network_class(row: TinyFamily) -> type:
    module, _, name = f"comfy.ldm.{row.network}".rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        pytest.skip(f"this ComfyUI has no {row.family}")


def _random(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A little louder than at the start of a training, so that prompts and guidance are seen."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return 1.2 * noise / math.sqrt(math.prod(shape[1:]))
    return 1.5 + noise / 10 if key.endswith((".weight", ".scale")) else noise / 10


def random_weights(shapes: Mapping[str, torch.Tensor], seed: str) -> dict[str, torch.Tensor]:
    """Of these names and shapes, always the same for a seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return {key: _random(key, value.shape, generator) for key, value in shapes.items()}


def shapes_of(row: TinyFamily) -> Mapping[str, torch.Tensor]:
    """What a file of it holds, on the meta device."""
    with row.smaller():
        network = _network_class(row)(**row.config, device="meta", operations=comfy.ops.disable_weight_init)
    return network.state_dict()


@functools.cache
def _state_dict(name: str) -> dict[str, torch.Tensor]:
    return random_weights(shapes_of(TINY_FAMILIES[name]), name)


@contextlib.contextmanager
def replaced_sizes(row: TinyFamily) -> Iterator[None]:
    """What ComfyUI takes for granted once it knows the family is as in `row`."""
    detect = comfy.model_detection.model_config_from_unet

    def detect_small(state: dict[str, torch.Tensor], *args, **kwargs):
        marks = {key: torch.empty(shape, device="meta") for key, shape in row.marks.items()}
        config = detect({**state, **marks}, *args, **kwargs)
        config.unet_config.update({key: row.config[key] for key in row.assumed})
        return config

    with mock.patch.object(comfy.model_detection, "model_config_from_unet", detect_small), row.smaller():
        yield


def tiny_model(
    name: str, stored: Callable[[dict[str, torch.Tensor]], dict] = dict, **model_options: Any
) -> comfy.model_patcher.ModelPatcher:
    """A fresh one each time, always with the same weights. `stored`: those as another file has them."""
    with replaced_sizes(TINY_FAMILIES[name]):
        return comfy.sd.load_diffusion_model_state_dict(stored(_state_dict(name)), model_options=model_options)


def conditioning(name: str, prompt: str, length: int | None = None) -> list:
    """As the family's text encoder would make it, but random; always the same for a prompt of so many tokens."""
    row = TINY_FAMILIES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {prompt}".encode()))
    tokens = length or row.tokens or 4 + len(prompt)
    cond = torch.randn(1, tokens, row.width, generator=generator)
    entries: dict[str, Any] = row.extras(generator, tokens)
    if row.pooled:
        entries["pooled_output"] = torch.randn(1, row.pooled, generator=generator)
    if row.masked:
        entries["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        if row.tokens:
            entries["attention_mask"][:, -2:] = 0
    return [[cond, entries]]


def empty_latent(name: str, batch: int = 1, wider: int = 1) -> dict:
    """LATENT of the size that the tests use, or so many times as wide."""
    latent = TINY_FAMILIES[name].latent
    if not isinstance(latent[0], tuple):
        return {"samples": _zeros(latent, batch, wider)}
    video, *others = latent
    tensors = [_zeros(video, batch, wider), *(_zeros(other, batch, 1) for other in others)]
    return {"samples": comfy.nested_tensor.NestedTensor(tensors)}


def _zeros(shape: tuple[int, ...], batch: int, wider: int) -> torch.Tensor:
    return torch.zeros(batch, *shape[:-1], shape[-1] * wider)


def flat(samples: Any) -> torch.Tensor:
    """[b, n], of one latent or of several."""
    tensors = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)

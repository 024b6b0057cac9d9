"""Real architectures at their true sizes: the arguments of ComfyUI's own networks, and the prompts they are given."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

UNET_PREFIX = "model.diffusion_model."
_UNET = UNET_PREFIX


@dataclass(frozen=True)
class PromptSizes:
    """What a text encoder makes of a prompt: tokens (1, `tokens`, `width`), and a vector of `pooled` channels.

    `extras`: what else is in the condition, of the number of tokens.
    """

    tokens: int
    width: int
    pooled: int = 0
    extras: Callable[[int], dict] = lambda tokens: {}

    def condition(self) -> dict[str, Any]:
        """Zeros, as an entry of a CONDITIONING."""
        cond = {"cross_attn": torch.zeros(1, self.tokens, self.width), "model_conds": {}, **self.extras(self.tokens)}
        return {**cond, "pooled_output": torch.zeros(1, self.pooled)} if self.pooled else cond


@dataclass(frozen=True)
class Architecture:
    """`arguments` of ComfyUI's `network`, a class in comfy.ldm; `marks`: further tensors that its checkpoints carry.

    `prompt`: of those whose evaluations are counted.
    """

    arguments: dict
    marks: dict[str, torch.Tensor] = field(default_factory=dict)
    network: str = "modules.diffusionmodules.openaimodel.UNetModel"
    prompt: PromptSizes | None = None

    def network_class(self) -> type:
        module, _, name = self.network.rpartition(".")
        return getattr(importlib.import_module(f"comfy.ldm.{module}"), name)


_SD = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "num_heads": 8,
}
_Y = {"num_classes": "sequential", "adm_in_channels": 2816}
_SD15 = {**_SD, "context_dim": 768}
_SD2 = {**_SD, "context_dim": 1024, "use_linear_in_transformer": True}
_SDXL = {
    **_SD2,
    **_Y,
    "context_dim": 2048,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}
_REFINER = {
    **_SD2,
    **_Y,
    "adm_in_channels": 2560,
    "context_dim": 1280,
    "model_channels": 384,
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_middle": 4,
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
}
_SSD1B = {
    **_SDXL,
    "transformer_depth": [0, 0, 2, 2, 4, 4],
    "transformer_depth_middle": -1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
}
_VEGA = {
    **_SDXL,
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": -1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
}
_KOALA = {
    **_SDXL,
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 2, 5],
    "transformer_depth_middle": -2,
    "transformer_depth_output": [0, 0, 2, 2, 5, 5],
}
_X4 = {**_SD2, "in_channels": 7, "model_channels": 256, "channel_mult": [1, 2, 2, 4], "num_classes": 1000}
_X4 |= {"transformer_depth": [0, 0] + [1] * 6, "transformer_depth_output": [0] * 3 + [1] * 9}
_SVD = {**_SD2, "in_channels": 8, "num_classes": "sequential", "adm_in_channels": 768}
_SVD |= {"use_temporal_attention": True, "use_temporal_resblock": True, "extra_ff_mix_layer": True}
_SVD |= {"use_spatial_context": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0}
_SVD |= {"video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False}
_NOTHING = torch.tensor([])
# By this ComfyUI recognises SD 2.x with v-prediction: the values of this bias spread more there.
_SD2_BIAS = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_EPS, _SD2_V = ({_SD2_BIAS: torch.linspace(-spread, spread, 320)} for spread in (0.1, 0.2))
_ZERO123 = {"cc_projection.weight": torch.zeros(768, 772), "cc_projection.bias": torch.zeros(768)}

UNETS = {
    "SD 1.5": Architecture(_SD15, prompt=PromptSizes(77, 768)),
    "SD 1.5 inpainting": Architecture({**_SD15, "in_channels": 9}),
    "SD 1.5 InstructPix2Pix": Architecture({**_SD15, "in_channels": 8}),
    "Stable Zero123": Architecture({**_SD15, "in_channels": 8}, _ZERO123),
    "SD 2.1 base": Architecture(_SD2, _SD2_EPS),
    "SD 2.1": Architecture(_SD2, _SD2_V),
    "SD 2 inpainting": Architecture({**_SD2, "in_channels": 9}, _SD2_EPS),
    "SD 2.1 unCLIP H": Architecture({**_SD2, **_Y, "adm_in_channels": 2048}, _SD2_V),
    "SD x4 upscaler": Architecture(_X4),
    "SDXL": Architecture(_SDXL, prompt=PromptSizes(77, 2048, pooled=1280)),
    "SDXL v": Architecture(_SDXL, {"v_pred": _NOTHING}),
    "SDXL v zsnr": Architecture(_SDXL, {"v_pred": _NOTHING, "ztsnr": _NOTHING}),
    "SDXL inpainting": Architecture({**_SDXL, "in_channels": 9}),
    "SDXL InstructPix2Pix": Architecture({**_SDXL, "in_channels": 8}),
    "CosXL": Architecture(_SDXL, {"edm_vpred.sigma_max": torch.tensor(120.0)}),
    "Playground 2.5": Architecture(_SDXL, {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}),
    "SDXL refiner": Architecture(_REFINER),
    "SSD-1B": Architecture(_SSD1B),
    "Segmind Vega": Architecture(_VEGA),
    "KOALA 700M": Architecture(_KOALA),
    "SVD": Architecture(_SVD),
}


def _sd3(depth: int, positions: int, **more) -> Architecture:
    """`depth` blocks of 64 channels each of them; positions are given for so many patches each way."""
    context = {"in_features": 4096, "out_features": 64 * depth}
    arguments = {
        "input_size": None,
        "in_channels": 16,
        "out_channels": 16,
        "depth": depth,
        "adm_in_channels": 2048,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": context},
        "num_patches": positions**2,
        "pos_embed_max_size": positions,
        "qk_norm": "rms",
        **more,
    }
    # Of CLIP 77 tokens, and of T5 as many.
    prompt = PromptSizes(154, 4096, pooled=2048)
    return Architecture(arguments, {}, "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper", prompt)


_Z_IMAGE = {
    "in_channels": 16,
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "qk_norm": True,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_ANIMA = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "num_blocks": 28,
    "num_heads": 16,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
}
_HUNYUAN_VIDEO_15 = {
    "in_channels": 65,
    "out_channels": 32,
    "patch_size": [1, 1, 1],
    "hidden_size": 2048,
    "num_heads": 16,
    "depth": 54,
    "depth_single_blocks": 0,
    "context_in_dim": 3584,
    "vec_in_dim": None,
    "vision_in_dim": 1152,
    "axes_dim": [16, 56, 56],
    "mlp_ratio": 4.0,
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": False,
    "byt5": True,
    "meanflow": False,
    "meanflow_sum": True,
    "use_cond_type_embedding": True,
}
_WAN_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
_TOKENS = 128  # of a prompt, where the text encoder gives as many as it has

TRANSFORMERS = {
    "SD3.5 medium": _sd3(24, 384, x_block_self_attn_layers=list(range(13))),
    "SD3.5 large": _sd3(38, 192),
    "Z-Image": Architecture(_Z_IMAGE, {}, "lumina.model.NextDiT", PromptSizes(_TOKENS, 2560)),
    "Qwen-Image": Architecture(
        {"num_layers": 60}, {}, "qwen_image.model.QwenImageTransformer2DModel", PromptSizes(_TOKENS, 3584)
    ),
    # As its text adapter, a part of the network that ComfyUI runs once per sampling, leaves a prompt.
    "Anima": Architecture(_ANIMA, {}, "anima.model.Anima", PromptSizes(512, 1024)),
    "Wan 2.2 14B": Architecture(_WAN_14B, {}, "wan.model.WanModel", PromptSizes(512, 4096)),
    "HunyuanVideo 1.5": Architecture(
        _HUNYUAN_VIDEO_15, {}, "hunyuan_video.model.HunyuanVideo", PromptSizes(_TOKENS, 3584, pooled=3584)
    ),
}
ARCHITECTURES = UNETS | TRANSFORMERS

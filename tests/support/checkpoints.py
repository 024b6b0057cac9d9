"""Real architectures at their true sizes: on the meta device, and as full checkpoint files with random weights.

Names and shapes come from ComfyUI's own modules; what a checkpoint is, ComfyUI detects from them.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_base
import comfy.model_detection
import comfy.ops
import comfy.supported_models_base
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

_UNET = "model.diffusion_model."
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


@dataclass(frozen=True)
class Architecture:
    """`unet`: the arguments of ComfyUI's UNetModel; `marks`: further tensors that its checkpoints carry."""

    unet: dict
    marks: dict[str, torch.Tensor] = field(default_factory=dict)


_NOTHING = torch.tensor([])
# By this ComfyUI recognises SD 2.x with v-prediction: the values of this bias spread more there.
_SD2_BIAS = f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_EPS, _SD2_V = ({_SD2_BIAS: torch.linspace(-spread, spread, 320)} for spread in (0.1, 0.2))
_ZERO123 = {"cc_projection.weight": torch.zeros(768, 772), "cc_projection.bias": torch.zeros(768)}

ARCHITECTURES = {
    "SD 1.5": Architecture(_SD15),
    "SD 1.5 inpainting": Architecture({**_SD15, "in_channels": 9}),
    "SD 1.5 InstructPix2Pix": Architecture({**_SD15, "in_channels": 8}),
    "Stable Zero123": Architecture({**_SD15, "in_channels": 8}, _ZERO123),
    "SD 2.1 base": Architecture(_SD2, _SD2_EPS),
    "SD 2.1": Architecture(_SD2, _SD2_V),
    "SD 2 inpainting": Architecture({**_SD2, "in_channels": 9}, _SD2_EPS),
    "SD 2.1 unCLIP H": Architecture({**_SD2, **_Y, "adm_in_channels": 2048}, _SD2_V),
    "SD x4 upscaler": Architecture(_X4),
    "SDXL": Architecture(_SDXL),
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


def names_and_shapes(name: str) -> dict[str, torch.Tensor]:
    """The diffusion model of a checkpoint file: tensors on the meta device, but for those that show what it is."""
    architecture = ARCHITECTURES[name]
    unet = UNetModel(**architecture.unet, device="meta", operations=comfy.ops.disable_weight_init)
    state = {f"{_UNET}{key}": value for key, value in unet.state_dict().items()}
    return state | architecture.marks


def detect(state: dict[str, torch.Tensor]) -> comfy.supported_models_base.BASE:
    """What ComfyUI takes a checkpoint's state dict for."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    config = comfy.model_detection.model_config_from_unet(state, prefix)
    config.set_inference_dtype(torch.bfloat16, None)
    return config


def on_meta(
    name: str, stored: torch.dtype = torch.bfloat16, computed: torch.dtype | None = None
) -> comfy.model_base.BaseModel:
    """The model that ComfyUI makes of such a checkpoint, on the meta device."""
    return _new_model(name, torch.device("meta"), stored, computed)


def _new_model(
    name: str, device: torch.device, stored: torch.dtype, computed: torch.dtype | None
) -> comfy.model_base.BaseModel:
    """With weights `stored` in one dtype, which are cast to another one to compute with, if it is given."""
    state = names_and_shapes(name)
    config = detect(state)
    config.set_inference_dtype(stored, computed)
    with torch.no_grad():  # Stable Zero123 fills a layer in place
        return config.get_model(state, _UNET, device=device)


def _whole(name: str) -> dict[str, torch.Tensor]:
    """Diffusion model, text encoders and VAE in the layout of a checkpoint file, on the meta device."""
    state = names_and_shapes(name)
    config = detect(state)
    clip = config.clip_target().clip(device="meta", dtype=torch.bfloat16)
    sizes = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    sizes |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=sizes, embed_dim=4)
    state |= config.process_clip_state_dict_for_saving(clip.state_dict())
    return state | config.process_vae_state_dict_for_saving(vae.state_dict())


class RandomWeights:
    """Values that keep activations finite: matrices scaled by their inputs, norms near 1, biases near 0."""

    def __init__(self, seed: int):
        # One block for all tensors; its length is a prime, so that no two rows of a matrix are the same.
        self.block = torch.randn(1_048_573, generator=torch.Generator().manual_seed(seed))
        self.scaled: dict[tuple[float, float, torch.dtype], torch.Tensor] = {}
        self.start = 0

    def _block(self, key: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        mean, deviation = 0.0, 0.02
        if len(shape) < 2:
            mean = 1.0 if key.endswith(".weight") else 0.0
        elif "embedding" not in key:
            deviation = 1 / math.sqrt(math.prod(shape[1:]))
        if (mean, deviation, dtype) not in self.scaled:
            self.scaled[mean, deviation, dtype] = (self.block * deviation + mean).to(dtype)
        return self.scaled[mean, deviation, dtype]

    def pieces(self, key: str, shape: torch.Size, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The values of one tensor, flat, a piece at a time."""
        block, left = self._block(key, shape, dtype), math.prod(shape)
        while left:
            piece = block[self.start : self.start + left]
            yield piece
            left -= len(piece)
            self.start = (self.start + len(piece)) % len(block)


def random_model(
    name: str, device: torch.device, stored: torch.dtype, computed: torch.dtype | None = None
) -> comfy.model_base.BaseModel:
    """The model that ComfyUI would make of such a checkpoint with random weights, without the file."""
    model, weights = _new_model(name, device, stored, computed), RandomWeights(0)
    for key, parameter in model.diffusion_model.named_parameters():
        flat = parameter.data.view(-1)
        for piece in weights.pieces(key, parameter.shape, parameter.dtype):
            flat[: len(piece)] = piece.to(device)
            flat = flat[len(piece) :]
    return model


_DTYPES = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


def write_checkpoint(path: Path, name: str, *, seed: int = 0, unet_dtype: torch.dtype = torch.bfloat16) -> Path:
    """A full checkpoint with random weights, all in bf16 but the diffusion model. Written as they are made, so that
    no memory is needed for them."""
    state = {key: value for key, value in _whole(name).items() if value.is_floating_point()}
    dtypes = {key: unet_dtype if key.startswith(_UNET) else torch.bfloat16 for key in state}
    weights, header, end = RandomWeights(seed), {}, 0
    for key, value in state.items():
        start, end = end, end + dtypes[key].itemsize * value.numel()
        header[key] = {"dtype": _DTYPES[dtypes[key]], "shape": list(value.shape), "data_offsets": [start, end]}
    described = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little"))
        file.write(described)
        for key, value in state.items():
            for piece in weights.pieces(key, value.shape, dtypes[key]):
                file.write(memoryview(piece.view(torch.uint8).numpy()))
    return path

"""Real architectures at their true sizes: on the meta device, and as full checkpoint files with random weights.

Names and shapes come from ComfyUI's own modules; what a checkpoint is, ComfyUI detects from them.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import comfy.model_base
import comfy.model_detection
import comfy.ops
import comfy.supported_models_base
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

from comfyui_agd.tests.support.architectures import ARCHITECTURES
from comfyui_agd.tests.support.architectures import UNET_PREFIX as _UNET


def names_and_shapes(name: str) -> dict[str, torch.Tensor]:
    """The diffusion model of a checkpoint file: tensors on the meta device, but for those that show what it is."""
    architecture = ARCHITECTURES[name]
    network = architecture.network_class()(
        **architecture.arguments, device="meta", operations=comfy.ops.disable_weight_init
    )
    state = {f"{_UNET}{key}": value for key, value in network.state_dict().items()}
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

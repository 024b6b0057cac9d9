"""Checkpoint files, with LoRAs, as ComfyUI loads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sd
import comfy.utils
import torch

BASE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


class LoadedCheckpoint(NamedTuple):
    """ComfyUI's MODEL, CLIP and VAE; the VAE is None unless asked for."""

    model: Any
    clip: Any
    vae: Any


def load_checkpoint(
    path: Path, loras: Sequence[tuple[Path, float]] = (), dtype: str | None = None, *, with_vae: bool = False
) -> LoadedCheckpoint:
    """A full checkpoint file as CheckpointLoaderSimple loads it, with LoRAs and their strengths.

    `dtype`: one of `BASE_DTYPES` for the diffusion model's weights; None leaves the choice to ComfyUI. Raises
    `ValueError`.
    """
    options = {"dtype": BASE_DTYPES[dtype]} if dtype else {}
    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=with_vae, model_options=options)
    if model is None or clip is None:
        raise ValueError(f"{path} lacks a diffusion model or a text encoder; AGD needs a full checkpoint.")
    for file, strength in loras:
        before = len(model.patches)
        model, clip = comfy.sd.load_lora_for_models(model, clip, _load_lora(file), strength, strength)
        if len(model.patches) == before:
            raise ValueError(f"{file} changes nothing in the diffusion model of {path}; it is a LoRA of another base.")
    return LoadedCheckpoint(model, clip, vae)


def load_expert(path: Path, dtype: str | None = None) -> Any:
    """A MODEL from a file of a diffusion model alone, or of a full checkpoint. Raises `ValueError`."""
    options = {"dtype": BASE_DTYPES[dtype]} if dtype else {}
    try:
        return comfy.sd.load_diffusion_model(str(path), model_options=options)
    except Exception as error:  # ComfyUI lets through whatever its readers raise
        raise ValueError(f"{path} can't be read as a diffusion model ({error}).") from error


def _load_lora(file: Path) -> dict[str, torch.Tensor]:
    try:
        return comfy.utils.load_torch_file(str(file), safe_load=True)
    except Exception as error:  # ComfyUI lets through whatever its readers raise
        raise ValueError(f"{file} can't be read as a LoRA ({error}).") from error

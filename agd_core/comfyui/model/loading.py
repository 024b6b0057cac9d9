"""Files of models, with LoRAs, as ComfyUI's loader nodes load them; what is loaded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
import torch
from safetensors import safe_open

BASE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class LoadedCheckpoint(NamedTuple):
    """ComfyUI's MODEL, CLIP and VAE; the VAE is None unless asked for."""

    model: Any
    clip: Any
    vae: Any


def load_checkpoint(path: Path, dtype: str | None = None, *, with_vae: bool = False) -> LoadedCheckpoint:
    """A full checkpoint file as CheckpointLoaderSimple loads it.

    `dtype`: one of `BASE_DTYPES` for the diffusion model's weights; None leaves the choice to ComfyUI. Raises
    `ValueError`.
    """
    with _read_as("a checkpoint", path):
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=with_vae, embedding_directory=_embeddings(), model_options=_stored_in(dtype)
        )
    if model is None:
        raise ValueError(f"{path} has no diffusion model; AGD needs a full checkpoint.")
    if clip is None:
        raise ValueError(
            f"{path} has no text encoder: give it as --diffusion-model, and the text encoder's files as --text-encoder."
        )
    return LoadedCheckpoint(model, clip, vae)


def load_diffusion_model(path: Path, dtype: str | None = None) -> Any:
    """A MODEL as UNETLoader loads it, from a file of a diffusion model alone or of a full checkpoint.

    `dtype` as for `load_checkpoint`. Raises `ValueError`.
    """
    if path.suffix == ".gguf":
        raise ValueError(f"{path} is for a pack's own loader node: use AGD Train in ComfyUI, or a --loader function.")
    with _read_as("a diffusion model", path):
        return comfy.sd.load_diffusion_model(str(path), model_options=_stored_in(dtype))


def load_text_encoder(paths: Sequence[Path], clip_type: str | None) -> Any:
    """A CLIP as CLIPLoader and DualCLIPLoader load it, or with three or four files, which need no type, those for them.

    Raises `ValueError`.
    """
    used_as = _clip_type_of(clip_type)
    for path in paths:
        with _read_as("a text encoder", path):
            known = _is_text_encoder(path)
        if not known:
            raise ValueError(f"{path} is no text encoder that ComfyUI knows.")
    with _read_as(f"the text encoder of --clip-type {clip_type}" if clip_type else "a text encoder", *paths):
        return comfy.sd.load_clip([str(path) for path in paths], _embeddings(), used_as)


def _clip_type_of(name: str | None) -> comfy.sd.CLIPType:
    """By the name that ComfyUI's nodes have for it."""
    plain = comfy.sd.CLIPType.STABLE_DIFFUSION
    known = {each.name.lower(): each for each in comfy.sd.CLIPType} | {"sdxl": plain}
    if name is not None and name not in known:
        raise ValueError(f"There is no --clip-type {name!r}; ComfyUI has {', '.join(sorted(known))}.")
    return plain if name is None else known[name]


def load_vae(path: Path) -> Any:
    """A VAE as VAELoader loads it. Raises `ValueError`."""
    with _read_as("a VAE", path):
        weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
        vae = comfy.sd.VAE(sd=weights, metadata=metadata)
        vae.throw_exception_if_invalid()
    return vae


def with_loras(model: Any, clip: Any, loras: Sequence[tuple[Path, float]]) -> tuple[Any, Any]:
    """(MODEL, CLIP) with these LoRAs and their strengths, as LoraLoader has them. Raises `ValueError`."""
    for file, strength in loras:
        before = len(model.patches)
        with _read_as("a LoRA", file):
            weights = comfy.utils.load_torch_file(str(file), safe_load=True)
        model, clip = comfy.sd.load_lora_for_models(model, clip, weights, strength, strength)
        if len(model.patches) == before:
            raise ValueError(f"{file} changes nothing in the diffusion model; it is a LoRA of another base.")
    return model, clip


def _stored_in(dtype: str | None) -> dict[str, torch.dtype]:
    return {"dtype": BASE_DTYPES[dtype]} if dtype else {}


def _embeddings() -> list[str]:
    return folder_paths.get_folder_paths("embeddings")


@contextmanager
def _read_as(what: str, *paths: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ComfyUI lets through whatever its readers raise
        names, reason = " and ".join(map(str, paths)), " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{names} can't be read as {what} ({reason}).") from error


def _is_text_encoder(path: Path) -> bool:
    """By the names and shapes in it: ComfyUI would load anything, and leave what it doesn't find without values."""
    if path.suffix not in (".safetensors", ".sft"):
        return True
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        state = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    return "transformer.resblocks.0.ln_1.weight" in state or comfy.sd.detect_te_model(state) is not None


def loaded_models() -> list[comfy.model_patcher.ModelPatcher]:
    """ComfyUI's, without the places of MODELs that are gone while others have their network."""
    return [model for model in comfy.model_management.loaded_models() if model is not None]

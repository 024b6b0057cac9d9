"""A tiny transformer as people have it: a diffusion model's file, a text encoder's and a VAE's, with random weights.

It is an SD 3 whose only text encoder is CLIP-L, for that one can be made small: ComfyUI reads no sizes from its file.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import comfy.clip_model
import comfy.ops
import comfy.taesd.taesd
import comfy.text_encoders.long_clipl as long_clipl
import folder_paths
import torch
from safetensors.torch import save_file

from .tiny_families import TINY_FAMILIES, random_weights, shapes_of

_CLIP = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
_CLIP_L = {**_CLIP, "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407}
_WIDTH, _CLIP_G = 4096, 1280  # of SD 3's prompts; of the pooled vector's other half
_SIZES = {
    "adm_in_channels": _CLIP["hidden_size"] + _CLIP_G,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": _WIDTH, "out_features": 128},
    },
}
_SD3 = TINY_FAMILIES["sd3"]
_FAMILY = replace(_SD3, config=_SD3.config | _SIZES)
_FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras")


@contextlib.contextmanager
def small_clip() -> Iterator[None]:
    """Inside, CLIP-L has the sizes of `write_text_encoder`'s."""

    def sizes(weights: dict, tokenizer_data: dict, model_options: dict) -> tuple[dict, dict]:
        return tokenizer_data, {**model_options, "clip_l_model_config": _CLIP}

    with mock.patch.object(long_clipl, "model_options_long_clip", sizes):
        yield


@contextlib.contextmanager
def models_folder(path: Path) -> Iterator[Path]:
    """Inside, ComfyUI lists what is in the subfolders of `path`, and nothing else."""
    folders = {kind: ([str(path / kind)], {".safetensors"}) for kind in _FOLDERS}
    for kind in _FOLDERS:
        (path / kind).mkdir()
    with mock.patch.dict(folder_paths.folder_names_and_paths, folders):
        yield path


def write_diffusion_model(path: Path, seed: str = "high") -> Path:
    save_file(random_weights(shapes_of(_FAMILY), seed), path)
    return path


def write_text_encoder(path: Path) -> Path:
    encoder = comfy.clip_model.CLIPTextModel(_CLIP_L, torch.float32, "meta", comfy.ops.disable_weight_init)
    save_file(random_weights(encoder.state_dict(), "clip_l"), path)
    return path


def write_vae(path: Path) -> Path:
    """TAESD's architecture, the smallest that ComfyUI's VAE loader knows."""
    vae = comfy.taesd.taesd.TAESD(latent_channels=_FAMILY.latent[0])
    save_file(random_weights(vae.state_dict(), "vae") | {"vae_scale": torch.ones(())}, path)
    return path


def write_lora(path: Path) -> Path:
    """Of one layer."""
    layer = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    save_file({f"{layer}.lora_up.weight": torch.ones(128, 1), f"{layer}.lora_down.weight": torch.ones(1, 128)}, path)
    return path

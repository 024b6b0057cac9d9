"""The second base, toy-dit: a rectified-flow transformer with joint attention, ComfyUI's own SD3 at small size.

The text encoder and the autoencoder are those of the first base, in `model.py`.
"""

from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch

from .model import CONTEXT_DIM, LATENT_CHANNELS, WEIGHTS, ToyLatent, load_clip, load_vae

WIDTH = 128


class ToyDiT(comfy.supported_models.SD3):
    """Six joint blocks of two heads, a token for each 2x2 of the latent, RMS-normalised queries and keys."""

    latent_format = ToyLatent
    # Of so few tokens there is no need to spend more steps on the noisy end.
    sampling_settings = {"shift": 1.0}

    def __init__(self):
        text = {"in_features": CONTEXT_DIM, "out_features": WIDTH}
        super().__init__(
            {
                "in_channels": LATENT_CHANNELS,
                "out_channels": LATENT_CHANNELS,
                "patch_size": 2,
                "depth": WIDTH // 64,
                "num_blocks": 6,
                "qk_norm": "rms",
                "input_size": None,
                "num_patches": None,  # positions are sines and cosines that fit any size
                "pos_embed_max_size": 16,
                "adm_in_channels": CONTEXT_DIM,
                "context_embedder_config": {"target": "torch.nn.Linear", "params": text},
                "dtype": torch.float32,
            }
        )


def build_dit() -> comfy.model_base.BaseModel:
    """The diffusion model with uninitialised weights, fp32."""
    return ToyDiT().get_model({})


def load_dit(path: Path = WEIGHTS / "dit.safetensors") -> comfy.model_patcher.ModelPatcher:
    """MODEL."""
    model = build_dit()
    model.load_model_weights(comfy.utils.load_torch_file(str(path)))
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def load() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """(MODEL, CLIP, VAE), for `agd train --loader comfyui_agd.examples.toy.dit:load`."""
    return load_dit(), load_clip(), load_vae()

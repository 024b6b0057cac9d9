"""A ComfyUI MODEL, CLIP and VAE as the trainer sees them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_patcher
import torch
from PIL import Image

from ..backbones import describe_base, fingerprint
from ..compiled_parts import with_original_parts
from .denoiser import ComfyDenoiser
from .experts import TwoExperts
from .memory import ComfyMemory
from .previews import picture_of
from .text_encoder import ComfyTextEncoder


class ComfyModel:
    """Implements `training.model.Model`."""

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        clip: Any,
        *,
        autocast: torch.dtype | None = None,
        frames: int = 1,
        vae: Any = None,
        other_expert: tuple[comfy.model_patcher.ModelPatcher, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ):
        """`autocast`, `frames`: see `ComfyDenoiser`. `vae`: decodes previews; without it they are ComfyUI's
        fast approximation. `other_expert`: of a model of two, and which noise levels are not its own (`TwoExperts`).
        """
        self._model, self._vae = with_original_parts(model).clone(), vae
        described = describe_base(model.model, model.get_model_object("model_sampling"))
        self.base = replace(described, fingerprint=fingerprint(model))
        self.base_patches: dict[str, Any] = {"patched_weights": len(model.patches)} if model.patches else {}
        if other_expert is None:
            self.denoiser = ComfyDenoiser(self._model, autocast, frames)
        else:
            other, is_own = other_expert
            self.denoiser = TwoExperts(self._model, with_original_parts(other).clone(), is_own, autocast, frames)
        self.text_encoder = ComfyTextEncoder(clip, self._model)
        self.memory = ComfyMemory(self._model, self.denoiser)

    def picture(self, latent: torch.Tensor) -> Image.Image:
        """A latent (1, c, h, w) as the sampler leaves it, as a picture: decoded, or approximated without a VAE."""
        return picture_of(latent, self._model, self._vae)

"""A ComfyUI MODEL, CLIP and VAE as the trainer sees them."""

from collections.abc import Callable
from contextlib import nullcontext
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
from .patches_digest import patches_digest
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

    def made_of(self) -> dict[str, str]:
        """What training depends on besides the base's own weights, each by a short name.

        `loras`: those and other patches, on the model, the other expert and the text encoder; `other_expert`.
        """
        patches, found = [self._model.patches, self.text_encoder.patches], {}
        if isinstance(self.denoiser, TwoExperts):
            other = self.denoiser.other.model
            patches.append(other.patches)
            found["other_expert"] = fingerprint(other)
        return found | {"loras": patches_digest(*patches)}

    def picture(self, latent: torch.Tensor) -> Image.Image:
        """A latent (1, c, h, w) as the sampler leaves it, as a picture: decoded, or approximated without a VAE."""
        # A VAE that finds too little memory makes ComfyUI move the base out.
        with nullcontext() if self._vae is None else self.denoiser.while_others_load():
            return picture_of(latent, self._model, self._vae)

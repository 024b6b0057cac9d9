"""Pictures of latents: decoded by a VAE, or approximated as ComfyUI's fast previews are."""

from typing import Any

import comfy.model_patcher
import torch
from PIL import Image
from torch import nn

from ..backbones import backbone_of


def picture_of(latent: torch.Tensor, model: comfy.model_patcher.ModelPatcher, vae: Any = None) -> Image.Image:
    """A latent (1, c, h, w) of that MODEL, as training has it, as a picture; of video its first frame."""
    latent = backbone_of(model.model).split(latent)[0]
    if vae is not None:
        image = vae.decode(model.model.process_latent_out(latent.float()))[0]
        image = image[0] if image.ndim == 4 else image
    else:
        image = _approximate_picture(latent.float().cpu(), model.get_model_object("latent_format"))
    return Image.fromarray((image.float().cpu().clamp(0, 1) * 255).round().byte().numpy())


def _approximate_picture(latent: torch.Tensor, latent_format: Any) -> torch.Tensor:
    """(1, c, h, w) or (1, c, t, h, w) -> (8 h, 8 w, 3) in [0, 1]: ComfyUI's linear map from latent channels to colours,
    enlarged.

    A latent format without such a map shows its first three channels.
    """
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)  # of channels that are pixels, too
    latent = (latent if reshape is None else reshape(latent))[0]
    latent = latent[:, 0] if latent.ndim == 4 else latent
    if latent_format.latent_rgb_factors is not None:
        factors = torch.tensor(latent_format.latent_rgb_factors)
        bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
        image = torch.einsum("chw,cr->rhw", latent, factors) + bias[:, None, None]
    else:
        image = latent[:3] / 3
    image = nn.functional.interpolate((image[None] + 1) / 2, scale_factor=8, mode="bilinear")
    return image[0].movedim(0, -1)

"""The toy's autoencoder: 64x64x3 pictures to 8x8x12 latents and back, all convolutions at 1/4 and 1/8 size."""

import torch
import torch.nn.functional as F
from torch import nn

_PATCH = 4
_WIDTH = 64


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class Autoencoder(nn.Module):
    """`encode` and `decode` as ComfyUI's VAE calls them, on pictures in [-1, 1].

    No normalisation layers: over so few channels they would remove the very thing a flat background is, its mean.
    """

    def __init__(self, latent_channels: int):
        super().__init__()
        w, pixels = _WIDTH, 3 * _PATCH**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(_PATCH),
            nn.Conv2d(pixels, w, 3, padding=1),
            _Residual(w),
            _Residual(w),
            nn.Conv2d(w, w, 3, stride=2, padding=1),
            _Residual(w),
            nn.Conv2d(w, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, w, 3, padding=1),
            _Residual(w),
            _Residual(w),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(w, w, 3, padding=1),
            _Residual(w),
            _Residual(w),
            nn.Conv2d(w, pixels, 3, padding=1),
            nn.PixelShuffle(_PATCH),
        )

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> (b, c, h / 8, w / 8)."""
        return self.encoder(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, 3, 8 h, 8 w)."""
        return self.decoder(latents)

    @torch.no_grad()
    def normalise(self, latents: torch.Tensor) -> None:
        """Rescale the layers around the latents so that, over these (n, c, h, w), each channel is 0 +- 1."""
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        into, out = self.encoder[-1], self.decoder[0]
        into.weight /= deviation[:, None, None, None]
        into.bias.copy_((into.bias - mean) / deviation)
        # Exact inside the picture; at the border the zero padding now stands for the mean latent.
        out.bias += (out.weight.sum((2, 3)) * mean).sum(1)
        out.weight *= deviation[None, :, None, None]

"""Videos with sound: two latents of unlike sizes, which training takes as one, the sound as further channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Sound:
    """A sound's latent, (b, channels, n, bins) with n = 1 + per_frame (t - 1), beside its video's, (b, c, t, h, w).

    Both as one are (b, c + e, t, h, w): e further channels hold the sound's values in their order, and then zeros.
    """

    channels: int
    bins: int
    per_frame: int

    def shape(self, frames: int) -> tuple[int, int, int]:
        """Of the sound of a video with so many frames in its latent."""
        return self.channels, 1 + self.per_frame * (frames - 1), self.bins

    def extra_channels(self, video: Sequence[int]) -> int:
        """e, for a video's latent of shape (..., t, h, w)."""
        frames, height, width = video[-3:]
        return math.ceil(math.prod(self.shape(frames)) / (frames * height * width))

    def join(self, video: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
        """(b, c, t, h, w) and (b, channels, n, bins) -> (b, c + e, t, h, w)."""
        values, missing = sound.flatten(1), -sound[0].numel() % math.prod(video.shape[2:])
        further = nn.functional.pad(values, (0, missing)).view(len(video), -1, *video.shape[2:])  # (b, e, t, h, w)
        return torch.cat([video, further], dim=1)

    def split(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The opposite of `join`."""
        extra, shape = self.extra_channels(both.shape), self.shape(both.shape[2])
        values = both[:, -extra:].flatten(1)[:, : math.prod(shape)]
        return both[:, :-extra], values.reshape(len(both), *shape)

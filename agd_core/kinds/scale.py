"""Guidance in attention space, from nothing or from a minute of fitting (DESIGN 1.10).

Each site adds `scale(t) * delta` before the base's `to_out`. A new adapter has constants; fitted
(`agd calibrate`) it has a few numbers per channel.

Shapes: b rows, n image tokens, w channels of a site, S sites, K knots.
"""

import torch
from torch import nn

from ..config import AdapterConfig
from ..layers import Guidance

# What a new adapter adds of delta; docs/quality.md says what that is worth. Nothing in the middle of the UNet: the
# little that is left of the picture there changes as a whole.
START, START_IN_THE_MIDDLE = 0.35, 0.0
# The scale is linear between so many timesteps, evenly over the base's thousand.
KNOTS, LAST_TIMESTEP = 4, 999


class ScaleAdapter(nn.Module):
    """`scale(t) * delta`, a scale for each channel."""

    place = "attention"

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.sites = config.sites
        self.to_scale = operations.Linear(KNOTS, sum(site.width for site in config.sites), bias=False)

    def start(self) -> None:
        """A new adapter: what needs no training."""
        with torch.no_grad():
            for site, weight in zip(self.sites, self._by_site(self.to_scale.weight, dim=0), strict=True):
                weight.fill_(START_IN_THE_MIDDLE if site.name.startswith("middle") else START)

    def _by_site(self, values: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        return values.split([site.width for site in self.sites], dim)

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The scales at t, (b, 1, w) per site."""
        at = guidance.t.clamp(0, LAST_TIMESTEP) * ((KNOTS - 1) / LAST_TIMESTEP)
        near = (1 - (at[:, None] - torch.arange(KNOTS, device=at.device)).abs()).clamp(min=0)  # (b, K)
        return self._by_site(self.to_scale(near.to(guidance.dtype)[:, None]), dim=-1)

    def forward(self, name: str, delta: torch.Tensor, h: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """A site's delta (b, n, w) and its part of `prepare` -> (b, n, w), to be added before `to_out`."""
        return scale * delta

"""Guidance in attention space, as in NAG (arXiv 2505.21179), from nothing or from a minute of training.

Each layer adds `scale(t) * delta` before the base's `to_out`. A new adapter has constants (`attention-guidance`);
trained (`agd calibrate`) it has a few numbers per channel.

Shapes: b rows, n image tokens, w channels of a layer, S layers, K knots.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..config import AdapterConfig, AdapterLayer, BlockDistance, GainKindConfig, every_nth
from ..layers import Guidance
from .adapter_kind import AdapterKind

# What a new adapter adds of delta; docs/quality.md says what that is worth. Nothing in the middle of the UNet: the
# little that is left of the picture there changes as a whole.
START, START_INNERMOST = 0.35, 0.0
# The scale is linear between so many timesteps, evenly over the base's thousand.
KNOTS, LAST_TIMESTEP = 4, 999


@dataclass(frozen=True)
class ScaleConfig(GainKindConfig):
    """`attention_every`: n, it works in the attention of every n-th block of a stack."""

    name = "scale"
    attention_every: BlockDistance = 1

    @property
    def uses_negative(self) -> bool:
        return True

    def guided(self, layers: tuple[AdapterLayer, ...]) -> tuple[AdapterLayer, ...]:
        return every_nth(layers, self.attention_every)


class ScaleAdapter(AdapterKind):
    """`scale(t) * delta`, a scale for each channel."""

    Config = ScaleConfig

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__(config, operations)
        self.layers, self.widths = config.layers, config.guided_widths
        self.to_scale = operations.Linear(KNOTS, sum(self.widths), bias=False)

    def init_weights(self) -> None:
        """A new adapter: what needs no training."""
        with torch.no_grad():
            for layer, weight in zip(self.layers, self._by_layer(self.to_scale.weight, dim=0), strict=True):
                weight.fill_(START_INNERMOST if layer.innermost else START)

    def _by_layer(self, values: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        return values.split(self.widths, dim)

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The scales at t, (b, 1, w) per layer."""
        return self._by_layer(self.scales(guidance), dim=-1)

    def scales(self, guidance: Guidance) -> torch.Tensor:
        """At t, (b, 1, channels of all layers)."""
        at = guidance.t.clamp(0, LAST_TIMESTEP) * ((KNOTS - 1) / LAST_TIMESTEP)
        near = (1 - (at[:, None] - torch.arange(KNOTS, device=at.device)).abs()).clamp(min=0)  # (b, K)
        return self.to_scale(near.to(guidance.dtype)[:, None])

    def inside_attention(self, name: str, delta: torch.Tensor, h: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """A layer's delta (b, n, w) and its part of `prepare` -> (b, n, w), to be added before `to_out`."""
        return shared * delta

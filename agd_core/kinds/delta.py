"""Guidance from the base's own attention to both prompts (DESIGN 1.2).

`delta = attention(q, K_c, V_c) - attention(q, K_neg, V_neg)` is where guidance points, as far as one attention knows:
the base's own queries, keys and values, of the positive and of the negative prompt. Of it each site learns what to add
before the base's `to_out`:

    (scale(t) + modulation(omega, t)) * delta + out(silu(factor(omega, t) * hidden + shift(omega, t)))
    hidden = down(delta) + from_h(h)

`scale` is a `ScaleAdapter`: a new adapter guides with constants, or goes on from a fitted one. With a `rank` the
blocks' linear layers are changed as well (`low_rank.py`), for more quality at more cost. But not those of the keys and
values: where both prompts are the same, `delta` is zero.

Shapes: b rows, n image tokens, w channels of a site, H `hidden`, S sites, E `encoder_width`.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ..config import AdapterConfig
from ..layers import Guidance, zero_init
from .low_rank import LowRankAdapter
from .scale import ScaleAdapter

KEYS_VALUES = ("attn2.to_k", "attn2.to_v")


class DeltaAdapter(nn.Module):
    """A scale of `delta`, and a map of `delta` and `h` through H channels; omega and t modulate both."""

    place = "attention"

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.widths, self.hidden = [site.width for site in config.sites], config.hidden
        names, inner, H = [site.name for site in config.sites], 2 * config.encoder_width, config.hidden
        self.scale = ScaleAdapter(config, operations)
        # The modulation of all sites, so that it costs two products per evaluation.
        self.to_modulation = operations.Linear(inner, sum(self.widths))
        self.to_factor_and_shift = operations.Linear(inner, len(names) * 2 * H)

        def layers(sizes: list[tuple[int, int]], bias: bool = False) -> nn.ModuleDict:
            return nn.ModuleDict({n: operations.Linear(*size, bias=bias) for n, size in zip(names, sizes, strict=True)})

        self.down = layers([(w, H) for w in self.widths], bias=True)
        self.from_h = layers([(w, H) for w in self.widths])
        self.to_out = layers([(H, w) for w in self.widths])
        of_rank = replace(config, kind="low_rank", hidden=config.rank, rank=0) if config.rank else None
        self.low_rank = LowRankAdapter(of_rank, operations, leave=KEYS_VALUES) if of_rank else None

    def start(self) -> None:
        """A new adapter: `scale` alone."""
        self.scale.start()
        if self.low_rank is not None:
            self.low_rank.start()
        for layer in (self.to_modulation, self.to_factor_and_shift, self.to_out):
            zero_init(layer)

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> list[tuple]:
        """guidance with tokens (b, 1, 2, E) -> per site the scale (b, 1, w), factor and shift (b, 1, H), and what
        `linear` needs."""
        inner = F.silu(guidance.tokens.flatten(2))  # (b, 1, 2 E)
        modulations = self.to_modulation(inner).split(self.widths, dim=-1)
        scales = [s + m for s, m in zip(self.scale.prepare(guidance, context), modulations, strict=True)]
        maps = self.to_factor_and_shift(inner).split(2 * self.hidden, dim=-1)
        linears = self.low_rank.prepare(guidance, context) if self.low_rank is not None else [{}] * len(scales)
        return [
            (scale, *own.chunk(2, dim=-1), linear) for scale, own, linear in zip(scales, maps, linears, strict=True)
        ]

    def forward(self, name: str, delta: torch.Tensor, h: torch.Tensor, shared: tuple) -> torch.Tensor:
        """A site's delta and h (b, n, w), and its part of `prepare` -> (b, n, w), to be added before `to_out`."""
        scale, factor, shift, _ = shared
        hidden = self.down[name](delta) + self.from_h[name](h)
        # A factor of 1 + ..., for a new adapter's is zero.
        return scale * delta + self.to_out[name](F.silu(torch.addcmul(hidden + shift, hidden, factor)))

    def linear(self, name: str, path: str, x: torch.Tensor, shared: tuple) -> torch.Tensor:
        """As `LowRankAdapter.linear`."""
        return self.low_rank.linear(name, path, x, shared[-1])

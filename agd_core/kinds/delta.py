"""Guidance from the base's own attention to both prompts.

`delta = attention(q, K_c, V_c) - attention(q, K_neg, V_neg)` is where guidance points, as far as one attention knows:
the base's own queries, keys and values, of the positive and of the negative prompt. Of it each layer learns what to add
before the base's `to_out`:

    (scale(t) + modulation(omega, t)) * delta + out(silu((1 + factor(omega, t)) * hidden + shift(omega, t)))
    hidden = down(delta) + from_h(h)

`scale` is a `ScaleAdapter`: a new adapter guides with constants, or goes on from a trained one. With a `rank` the
blocks' linear layers are changed as well (`low_rank.py`), for more quality at more cost. But not those that the prompt
goes through, keys and values: where both prompts are the same, `delta` is zero.

Shapes: b rows, n image tokens, w channels of a layer, H `hidden`, S layers, E `encoder_width`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..config import (
    AdapterConfig,
    AdapterLayer,
    BlockDistance,
    EncodedKindConfig,
    InnerChannels,
    Linear,
    OptionalInnerChannels,
    every_nth,
)
from ..layers import Guidance, zero_init
from .adapter_kind import AdapterKind
from .low_rank import LowRankAdapter, LowRankConfig, describe_rank, describe_vector
from .scale import ScaleAdapter, ScaleConfig


@dataclass(frozen=True)
class DeltaConfig(EncodedKindConfig):
    """`hidden`: H. `rank`: of low-rank changes beside it; 0: none. `modulated`: those have m(t, omega).

    `vector`: channels inside a change of the vector of the timestep; 0: none. `attention_every`: n, it works in
    the attention of every n-th block of a stack, while its low-rank changes are in all.
    """

    name = "delta"
    hidden: InnerChannels = 128
    rank: OptionalInnerChannels = 0
    modulated: bool = False
    vector: OptionalInnerChannels = 0
    attention_every: BlockDistance = 1

    def validation_errors(self) -> Iterator[str]:
        yield from super().validation_errors()
        if self.rank and not self.modulated and not self.gain:
            yield "delta's low-rank changes with neither modulated nor gain would be the same for every guidance scale"

    @property
    def lora_rank(self) -> int:
        return self.rank

    @property
    def vector_width(self) -> int:
        return self.vector

    @property
    def uses_negative(self) -> bool:
        return True

    @property
    def merges(self) -> bool:
        return self.rank > 0 and self.gain and not self.modulated

    @property
    def low_rank(self) -> LowRankConfig | None:
        """The kind of the changes beside it."""
        shared = (self.gain, self.omega_embedding, self.encoder_width)
        return LowRankConfig(*shared, rank=self.rank, modulated=self.modulated) if self.rank else None

    def guided(self, layers: tuple[AdapterLayer, ...]) -> tuple[AdapterLayer, ...]:
        return every_nth(layers, self.attention_every)

    def describe(self) -> str:
        where = f" in one of {self.attention_every} blocks" if self.attention_every > 1 else ""
        beside = f", {describe_rank(self.rank, self.modulated)}" if self.rank else ""
        return f"{self.name}, hidden {self.hidden}{where}{beside}{describe_vector(self.vector)}"


class DeltaAdapter(AdapterKind):
    """A scale of `delta`, and a map of `delta` and `h` through H channels; omega and t modulate both."""

    Config = DeltaConfig

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__(config, operations)
        assert isinstance(config.kind, DeltaConfig)
        kind, guided = config.kind, config.guided_layers
        self.widths, self.hidden = config.guided_widths, kind.hidden
        inner, H = 2 * kind.encoder_width, kind.hidden
        self.scale = ScaleAdapter(replace(config, kind=ScaleConfig(attention_every=kind.attention_every)), operations)
        # The modulation of all layers, so that it costs two products per evaluation.
        self.to_modulation = operations.Linear(inner, sum(self.widths))
        self.to_factor_and_shift = operations.Linear(inner, 2 * kind.hidden * len(guided))
        self.down = nn.ModuleDict({each.name: operations.Linear(each.width, H) for each in guided})
        self.from_h = nn.ModuleDict({each.name: operations.Linear(each.width, H, bias=False) for each in guided})
        self.to_out = nn.ModuleDict({each.name: operations.Linear(H, each.width, bias=False) for each in guided})
        beside = replace(config, kind=kind.low_rank) if kind.low_rank is not None else None
        self.low_rank = LowRankAdapter(beside, operations, leave_prompt=True) if beside is not None else None

    def init_weights(self) -> None:
        """A new adapter: `scale` alone."""
        super().init_weights()
        self.scale.init_weights()
        if self.low_rank is not None:
            self.low_rank.init_weights()
        for layer in (self.to_modulation, self.to_factor_and_shift, self.to_out):
            zero_init(layer)

    def linears(self, layer: AdapterLayer) -> tuple[Linear, ...]:
        return self.low_rank.linears(layer) if self.low_rank is not None else ()

    def zero_initialised(self) -> Iterable[nn.Module]:
        beside = self.low_rank.zero_initialised() if self.low_rank is not None else ()
        return [*self.to_out.values(), *beside, *super().zero_initialised()]

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> list[tuple]:
        """guidance with tokens (b, 1, 2, E) -> per layer the scale (b, 1, w), 1 + factor and shift (b, 1, H), and what
        `at_linear` needs; of those that are not guided the last alone."""
        inner = F.silu(guidance.encoded().flatten(2))  # (b, 1, 2 E)
        scales = (self.scale.scales(guidance) + self.to_modulation(inner)).split(self.widths, dim=-1)
        factors, shifts = self.to_factor_and_shift(inner).unflatten(-1, (-1, 2, self.hidden)).unbind(-2)
        maps = zip((1 + factors).unbind(-2), shifts.unbind(-2), strict=True)
        linears: list[dict] = [{}] * len(scales)
        if self.low_rank is not None:
            linears = self.low_rank.prepare(guidance, context)
        parts = zip(self.widths, scales, linears, strict=True)
        return [(scale, *(next(maps) if width else (None, None)), linear) for width, scale, linear in parts]

    def inside_attention(self, name: str, delta: torch.Tensor, h: torch.Tensor, shared: tuple) -> torch.Tensor:
        """A layer's delta and h (b, n, w), and its part of `prepare` -> (b, n, w), to be added before `to_out`."""
        scale, factor, shift, _ = shared
        hidden = self.down[name](delta) + self.from_h[name](h)
        return torch.addcmul(self.to_out[name](F.silu(torch.addcmul(shift, hidden, factor))), scale, delta)

    def at_linear(self, name: str, path: str, x: torch.Tensor, shared: tuple) -> torch.Tensor:
        """As `LowRankAdapter.at_linear`."""
        assert self.low_rank is not None
        return self.low_rank.at_linear(name, path, x, shared[-1])

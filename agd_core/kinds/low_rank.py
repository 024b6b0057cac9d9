"""Low-rank changes of the base's own linear layers (LoRA, arXiv 2106.09685), scaled by guidance.

Each linear layer W of the blocks becomes

    W x + (omega - 1) * B (m(t, omega) * A x)

Without m that is a plain LoRA of strength omega - 1 (`agd_core/lora.py` writes it as one).

Shapes: b rows, n tokens, r the rank, L linear layers of all blocks, E `encoder_width`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..config import AdapterConfig, AdapterLayer, EncodedKindConfig, InnerChannels, Linear, OptionalInnerChannels
from ..layers import Guidance, zero_init
from .adapter_kind import AdapterKind


@dataclass(frozen=True)
class LowRankConfig(EncodedKindConfig):
    """`rank`: r. `modulated`: with m(t, omega); without it the changes are a LoRA of strength omega - 1.

    `vector`: channels inside a change of the vector of the timestep beside them; 0: none.
    """

    name = "low_rank"
    rank: InnerChannels = 16
    modulated: bool = False
    vector: OptionalInnerChannels = 0

    def validation_errors(self) -> Iterator[str]:
        yield from super().validation_errors()
        if not self.modulated and not self.gain:
            yield "low_rank with neither modulated nor gain would be the same for every guidance scale"

    @property
    def lora_rank(self) -> int:
        return self.rank

    @property
    def vector_width(self) -> int:
        return self.vector

    @property
    def merges(self) -> bool:
        return self.gain and not self.modulated

    def encoders(self, layers: int) -> int:
        return 1 if self.modulated or self.vector else 0

    def describe(self) -> str:
        return f"{self.name}, {describe_rank(self.rank, self.modulated)}{describe_vector(self.vector)}"


def describe_rank(rank: int, modulated: bool) -> str:
    return f"rank {rank}{', modulated' if modulated else ''}"


def describe_vector(width: int) -> str:
    return f", vector {width}" if width else ""


def key_of(layer: str, path: str) -> str:
    """A linear layer's name in the adapter's weights, where a dot would be a level of its own."""
    return f"{layer}_{path}".replace(".", "_")


class LowRankAdapter(AdapterKind):
    """`B (m * A x)` for each linear layer; B (`to_out`) starts at zero and m at one."""

    Config = LowRankConfig

    def __init__(self, config: AdapterConfig, operations=nn, *, leave_prompt: bool = False):
        """`leave_prompt`: leave linear layers as they are whose input is the prompt."""
        super().__init__(config, operations)
        assert isinstance(config.kind, LowRankConfig)
        self.leave_prompt, self.rank = leave_prompt, config.kind.rank
        self.by_layer = [(layer.name, self.linears(layer)) for layer in config.layers]
        sizes = {key_of(name, linear.path): linear for name, linears in self.by_layer for linear in linears}
        # The modulation of all layers, so that it costs one product per evaluation.
        inner, rank = 2 * config.kind.encoder_width, self.rank
        self.to_modulation = operations.Linear(inner, len(sizes) * rank) if config.kind.modulated else None
        self.down = nn.ModuleDict({key: operations.Linear(s.inputs, rank, bias=False) for key, s in sizes.items()})
        self.to_out = nn.ModuleDict({key: operations.Linear(rank, s.outputs, bias=False) for key, s in sizes.items()})

    def linears(self, layer: AdapterLayer) -> tuple[Linear, ...]:
        return tuple(linear for linear in layer.linears if not (self.leave_prompt and linear.reads_prompt))

    def zero_initialised(self) -> Iterable[nn.Module]:
        return [*self.to_out.values(), *super().zero_initialised()]

    def init_weights(self) -> None:
        """A new adapter adds exactly nothing."""
        super().init_weights()
        zero_init(self.to_out)
        if self.to_modulation is not None:
            zero_init(self.to_modulation)

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> list[dict[str, torch.Tensor | None]]:
        """guidance with tokens (b, 1, 2, E) -> per adapter layer, by linear layer, m (b, 1, r)."""
        if self.to_modulation is None:
            return [{linear.path: None for linear in linears} for _, linears in self.by_layer]
        m = 1 + self.to_modulation(F.silu(guidance.encoded().flatten(2)))  # (b, 1, L r)
        each = iter(m.split(self.rank, dim=-1))
        return [{linear.path: next(each) for linear in linears} for _, linears in self.by_layer]

    def at_linear(self, name: str, path: str, x: torch.Tensor, shared: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """What an adapter layer's linear layer `path` is given, (b, n, in), and the layer's part of `prepare` -> what
        is added to its output, (b, n, out)."""
        hidden, m = self.down[key_of(name, path)](x), shared[path]
        return self.to_out[key_of(name, path)](hidden if m is None else hidden * m)

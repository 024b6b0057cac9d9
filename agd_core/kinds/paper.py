"""What the two adapters of the paper's authors have in common, as their public code defines them (arXiv 2503.07274).

    g(s) = LN(W2 relu(W1 fourier(s) + b1) + b2)      fourier(s) = cos(2 pi (F s + phi)), F ~ N(0, 1), phi ~ U(0, 1)
    tt   = Wt te + bt                                te: the base's own embedding of t, after its MLP
    pp   = Wp P + bp                                 P: the prompt's tokens

In the additive one g has a LayerNorm behind its relu, too. Every layer has its own of all these; they are computed for
all layers together. Dropout, which is off by default there, is left out. What these adapters add is not multiplied by
(omega - 1): they act at omega = 1 too.

Shapes: b rows, m prompt tokens, d their channels (`context_dim`), e channels of te, H `hidden`, S layers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..config import AdapterConfig, AdapterLayer, BaseInfo, InnerChannels, KindConfig
from ..layers import Guidance, like
from .adapter_kind import AdapterKind

_WIDER = 4  # the hidden layer of g, times H
RELU_GAIN = math.sqrt(2)


@dataclass(frozen=True)
class PaperConfig(KindConfig):
    """`hidden`: H. `use_timestep`, `use_prompt`: whether the adapter knows t and the prompt; omega it always knows."""

    hidden: InnerChannels = 320
    use_timestep: bool = True
    use_prompt: bool = True

    @property
    def acts_at_1(self) -> bool:
        return True

    @property
    def uses_time(self) -> bool:
        return self.use_timestep

    def layers_of(self, base: BaseInfo) -> tuple[AdapterLayer, ...]:
        """All but those of the last block of every level on the way up, which the authors' code leaves out."""
        left_out = set(_last_blocks(base))
        return tuple(layer for layer in base.layers if layer.name.rpartition("_")[0] not in left_out)

    def describe(self) -> str:
        knows = {"omega": True, "t": self.use_timestep, "the prompt": self.use_prompt}
        return f"{self.name}, hidden {self.hidden}, from {', '.join(name for name, used in knows.items() if used)}"

    def describe_omega(self) -> str:
        return "fourier, with phases"


def _last_blocks(base: BaseInfo) -> Iterator[str]:
    """Of every level on the way up, which has a block more than on the way down: "output_5", for example."""
    counts = (count + 1 for count in reversed(base.architecture.get("num_res_blocks", ())))
    return (f"output_{end - 1}" for end in accumulate(counts))


class LinearPerLayer(nn.Module):
    """A linear layer for each of S adapter layers, computed in one product. Its parameters are cast to their input."""

    def __init__(self, layers: int, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(layers, outputs)) if bias else None

    def init_xavier(self, gain: float = 1.0) -> None:
        for weight in self.weight:
            nn.init.xavier_uniform_(weight, gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_uniform(self) -> None:
        """As torch's own linear layers begin."""
        bound = self.weight.shape[-1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(S, n, inputs), or (n, inputs) for all layers alike -> (S, n, outputs)."""
        out = x @ like(self.weight, x).mT
        return out if self.bias is None else out + like(self.bias, x)[:, None]


class NormPerLayer(nn.Module):
    """A LayerNorm for each of S adapter layers."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(layers, width))
        self.bias = nn.Parameter(torch.zeros(layers, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(S, n, width) -> the same."""
        return F.layer_norm(x, x.shape[-1:]) * like(self.weight, x)[:, None] + like(self.bias, x)[:, None]


class ReluPerLayer(nn.Module):
    """relu(W x + b) for each of S adapter layers; `normed`: with a LayerNorm behind it."""

    def __init__(self, layers: int, inputs: int, outputs: int, normed: bool):
        super().__init__()
        self.linear = LinearPerLayer(layers, inputs, outputs)
        self.norm = NormPerLayer(layers, outputs) if normed else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(S, n, inputs) -> (S, n, outputs)."""
        out = F.relu(self.linear(x))
        return out if self.norm is None else self.norm(out)


class PaperAdapter(AdapterKind):
    """`omega_factor`: of omega before its Fourier features; `normed`: whether g has the other LayerNorm."""

    changes_attention_output = True
    omega_factor: ClassVar[float] = 1.0
    normed: ClassVar[bool] = False

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__(config, operations)
        kind, S = config.kind, self.layer_count
        assert isinstance(kind, PaperConfig)
        H = kind.hidden
        self.frequencies: torch.Tensor
        self.phases: torch.Tensor
        self.register_buffer("frequencies", torch.randn(S, H))
        self.register_buffer("phases", torch.rand(S, H))
        self.omega_hidden = ReluPerLayer(S, H, _WIDER * H, self.normed)
        self.omega_out = LinearPerLayer(S, _WIDER * H, H)
        self.omega_norm = NormPerLayer(S, H)
        self.from_time = LinearPerLayer(S, config.time_channels, H) if kind.use_timestep else None
        self.from_prompt = LinearPerLayer(S, config.context_dim, H) if kind.use_prompt else None

    def init_weights(self) -> None:
        for projection in (self.from_time, self.from_prompt):
            if projection is not None:
                projection.init_uniform()
        self.omega_hidden.linear.init_xavier(RELU_GAIN)
        self.omega_out.init_xavier(RELU_GAIN)

    def embed_omega(self, guidance: Guidance) -> torch.Tensor:
        """g, (S, b, H)."""
        # In fp32: a thousand times omega in half precision would be another angle.
        omega = self.omega_factor * guidance.omega[:, None]
        frequencies, phases = (like(each, omega)[:, None] for each in (self.frequencies, self.phases))
        features = torch.cos(2 * math.pi * (frequencies * omega + phases)).to(guidance.dtype)  # (S, b, H)
        return self.omega_norm(self.omega_out(self.omega_hidden(features)))

    def embed_time(self, guidance: Guidance) -> torch.Tensor | None:
        """tt, (S, b, H), for an adapter that knows t."""
        if self.from_time is None:
            return None
        assert guidance.time is not None
        return self.from_time(guidance.time.to(guidance.dtype))

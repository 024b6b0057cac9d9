"""Guidance in the vector of the timestep, by which the blocks of a transformer are modulated (adaLN, arXiv 2212.09748).

It knows the negative prompt as a whole, by the difference of both prompts' mean tokens, and costs a step nothing.

Shapes: b rows, D channels of an encoder's token, d of a prompt's token, e of the vector.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..config import AdapterConfig, EncodedKindConfig
from ..layers import Guidance, zero_init


class VectorChange(nn.Module):
    """(omega, t, difference of both prompts) -> what is added to the vector, times omega - 1; zero at first."""

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        assert isinstance(config.kind, EncodedKindConfig)
        width = config.kind.vector_width
        self.from_tokens = operations.Linear(2 * config.kind.encoder_width, width)
        self.from_difference = operations.Linear(config.context_dim, width, bias=False)
        self.to_out = operations.Linear(width, config.vector)

    def init_weights(self) -> None:
        zero_init(self.to_out)

    def forward(self, guidance: Guidance, difference: torch.Tensor) -> torch.Tensor:
        """guidance with tokens (b, 1, 2, D), difference (b, d) -> (b, e)."""
        tokens = F.silu(guidance.encoded().flatten(1))
        hidden = self.from_tokens(tokens) + self.from_difference(difference.to(guidance.dtype))
        return self.to_out(F.silu(hidden))


def vector_of(config: AdapterConfig, operations) -> VectorChange | None:
    """Of an adapter of this config, if it changes the vector."""
    return VectorChange(config, operations) if config.kind.vector_width else None

"""Layers that several kinds of adapters have: what they know of the guidance scale and of time, as vectors.

Shapes: b rows, D channels of a token.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from .config import EncodedKindConfig


@dataclass(frozen=True)
class Guidance:
    """What an evaluation is guided by: omega and t (b,), fp32, and what the E encoders make of both, (b, E, 2, D).

    Without encoders `tokens` is None. `time`: (b, e), the base's own embedding of t, for kinds that use it. `dtype`: of
    the base's activations.
    """

    omega: torch.Tensor
    t: torch.Tensor
    time: torch.Tensor | None
    tokens: torch.Tensor | None
    dtype: torch.dtype

    def encoded(self) -> torch.Tensor:
        """`tokens`, for a kind that has encoders."""
        assert self.tokens is not None
        return self.tokens

    def for_rows(self, rows: int) -> "Guidance":
        """For an attention that another node has given more rows than the evaluation has."""
        time = None if self.time is None else fit_rows(self.time, rows)
        tokens = None if self.tokens is None else fit_rows(self.tokens, rows)
        return Guidance(fit_rows(self.omega, rows), fit_rows(self.t, rows), time, tokens, self.dtype)


def fit_rows(value: torch.Tensor, rows: int) -> torch.Tensor:
    """(r, ...) -> (rows, ...): repeated as a whole and cut, as ComfyUI fits a condition to a batch."""
    if len(value) == rows:
        return value
    return value.repeat(math.ceil(rows / len(value)), *[1] * (value.ndim - 1))[:rows]


def like(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A weight that is none of a ComfyUI layer's, in the dtype and on the device of `x`: it may be left on the CPU.

    The host doesn't wait for it, as it doesn't for those of ComfyUI's layers.
    """
    return weight.to(x.device, x.dtype, non_blocking=True)


def zero_init(module: nn.Module) -> None:
    """Zero the layers of `module`: a last projection, so that it adds nothing yet."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def sinusoidal(position: torch.Tensor, width: int, max_period: float) -> torch.Tensor:
    """Sines and cosines of `position` (b,), periods 2 pi ... 2 pi max_period -> (b, width), fp32."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=position.device) / half)
    angles = position.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GuidanceEncoder(nn.Module):
    """(omega, t) -> two tokens of `width` channels, one for each."""

    def __init__(self, config: EncodedKindConfig, width: int, operations=nn):
        super().__init__()
        e = config.encoder_width
        self.width = e
        self.log_omega = config.omega_embedding == "log"
        self.frequencies: torch.Tensor
        if not self.log_omega:
            # The authors' random Fourier features; part of the adapter's weights, because they are random.
            self.register_buffer("frequencies", torch.randn(e // 2))
        self.omega = nn.Sequential(operations.Linear(e, e), nn.SiLU(), operations.Linear(e, width))
        self.time = nn.Sequential(operations.Linear(e, e), nn.SiLU(), operations.Linear(e, width))

    def embed_omega(self, omega: torch.Tensor) -> torch.Tensor:
        """(b,) -> (b, e), fp32."""
        if self.log_omega:
            # Ten radians per factor e at the finest: omega = 7 and 7.5 stay close. Below 1e-2 nothing is guidance.
            return sinusoidal(10 * omega.float().clamp(min=1e-2).log(), self.width, max_period=100)
        omega = omega.float()
        angles = 2 * math.pi * omega[:, None] * like(self.frequencies, omega)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, omega: torch.Tensor, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """omega (b,), t (b,) in the model's timesteps -> (b, 2, D) in `dtype`."""
        embedded_t = sinusoidal(t, self.width, max_period=10_000)
        return torch.stack([self.omega(self.embed_omega(omega).to(dtype)), self.time(embedded_t.to(dtype))], dim=1)

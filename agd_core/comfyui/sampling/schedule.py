"""Noise levels (sigma) and ComfyUI's percent of a model's schedule: 0 is pure noise, 1 the end."""

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class NoiseLevels:
    """Those of a sampling's steps on the host. Reading one waits for the device, once for all that ask in a step.

    `level`: that of `timestep`, the last one that was asked for.
    """

    timestep: torch.Tensor | None = None
    level: float = math.inf

    def at(self, timestep: torch.Tensor) -> float:
        """Of a step; `timestep`: sigma (b,)."""
        if timestep is not self.timestep:
            self.timestep, self.level = timestep, float(timestep.flatten()[0])
        return self.level

    def forget(self) -> None:
        """Once a step is evaluated: a sampler may put the next level into the same tensor."""
        self.timestep = None


def percent_of(model_sampling: Any, sigma: float) -> float:
    """Where in the schedule that noise level is, 0 to 1: the inverse of ComfyUI's `percent_to_sigma`, which falls."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if model_sampling.percent_to_sigma(middle) > sigma else (low, middle)
    return high


def has_steps(sigmas: torch.Tensor) -> bool:
    """Whether a sampling of these levels (n,) has any: of less than two, as SplitSigmas may leave, nothing is made."""
    return sigmas.shape[-1] > 1


@dataclass(frozen=True)
class SigmaSpan:
    """A part of the noise levels. The end is not part of it, so that of two that meet there one takes the step."""

    sigma_start: float
    sigma_end: float

    @classmethod
    def between(cls, model_sampling: Any, start_percent: float, end_percent: float) -> "SigmaSpan":
        return cls(
            math.inf if start_percent <= 0 else float(model_sampling.percent_to_sigma(start_percent)),
            0.0 if end_percent >= 1 else float(model_sampling.percent_to_sigma(end_percent)),
        )

    @property
    def is_everything(self) -> bool:
        """Whether it is all of a sampling."""
        return self.sigma_start == math.inf and self.sigma_end == 0.0

    def covers(self, timestep: torch.Tensor, levels: NoiseLevels) -> bool:
        """Whether a step is in it; `timestep`: sigma (b,)."""
        if self.is_everything:
            return True  # the usual case, without reading a value back from the device
        return self.sigma_end < levels.at(timestep) <= self.sigma_start

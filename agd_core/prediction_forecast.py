"""Guidance at less than one evaluation per step: what follows from the steps before is forecast.

A guided prediction changes smoothly from step to step. A forecast is linear in sigma; its error is the next term of
Newton's interpolation polynomial, which every evaluation measures. Spectrum (arXiv 2603.01623) and EasyCache skip steps
too, by a schedule and by how much the model's input changes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

# The largest error of a forecast, as a share of the noise that it predicts: of |x - denoised|.
TOLERANCE = 0.1
MOST_IN_A_ROW = 2


@dataclass(frozen=True)
class PredictionForecast:
    """What a sampling has shown so far.

    `evaluated`: (sigma, the denoised prediction (b, ...)) of the last two steps that were evaluated, with less and less
    noise; `curvature`: the error of a forecast over the product of its distances to the two that it is made from;
    `in_a_row`: how many steps were forecast since.
    """

    evaluated: tuple[tuple[float, torch.Tensor], ...] = ()
    curvature: float = math.inf
    in_a_row: int = 0

    def step(
        self, sigma: float, x: torch.Tensor, evaluate: Callable[[], torch.Tensor], *, evaluated: bool = False
    ) -> tuple[torch.Tensor, "PredictionForecast"]:
        """The denoised prediction (b, ...) of latents x (b, ...) at sigma, and what is known after it.

        `evaluated`: has it evaluated in any case, as it is before three steps were. Steps with as little noise, or
        less, are forgotten: a sampling that goes back to more of it goes on from there.
        """
        known = replace(self, evaluated=tuple(step for step in self.evaluated if step[0] > sigma))
        if len(known.evaluated) < 2:
            return known._evaluate(sigma, evaluate, None)
        forecast = known._forecast(sigma)
        if not evaluated and known._is_near(sigma, x, forecast):
            return forecast, replace(known, in_a_row=known.in_a_row + 1)
        return known._evaluate(sigma, evaluate, forecast)

    def _evaluate(
        self, sigma: float, evaluate: Callable[[], torch.Tensor], forecast: torch.Tensor | None
    ) -> tuple[torch.Tensor, "PredictionForecast"]:
        now, curvature = evaluate(), self.curvature
        if forecast is not None:
            curvature = _norm(forecast - now) / self._distances(sigma)
        return now, PredictionForecast((*self.evaluated[-1:], (sigma, now)), curvature)

    def _forecast(self, sigma: float) -> torch.Tensor:
        (first, before), (second, last) = self.evaluated
        return torch.lerp(before, last, (sigma - first) / (second - first))

    def _is_near(self, sigma: float, x: torch.Tensor, forecast: torch.Tensor) -> bool:
        """Whether a forecast can be taken for the prediction."""
        if self.in_a_row >= MOST_IN_A_ROW or self.curvature == math.inf:
            return False
        return self.curvature * self._distances(sigma) <= TOLERANCE * _norm(x - forecast)

    def _distances(self, sigma: float) -> float:
        """The product of those to the two evaluations before."""
        return math.prod(abs(sigma - step) for step, _ in self.evaluated)


def _norm(values: torch.Tensor) -> float:
    return values.float().norm().item()

"""Fewer evaluations per sampling: steps that follow from those before them are forecast.

Predictions change smoothly from step to step, those of CFG as those of an adapter. A forecast is linear in sigma; its
error is the next term of Newton's interpolation polynomial, which every evaluation measures. Spectrum (arXiv
2603.01623) and EasyCache leave out steps too, by a schedule and by how much the model's input changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

# The largest error of a forecast, as a share of the noise that it predicts: of |x - denoised|.
TOLERANCE = 0.1
MOST_IN_A_ROW = 2
_FAR = 4.0  # times the distance to the last evaluation

Predictions = tuple[torch.Tensor, ...]  # denoised, (b, ...) each: an adapter's one, or CFG's two
Guided = Callable[[Predictions], torch.Tensor]  # the one that is sampled with, linear in them


@dataclass(frozen=True)
class Forecast:
    """What a sampling has shown so far.

    `evaluated`: (sigma, predictions) of the last two steps that were evaluated, with less and less noise; `curvature`:
    (), the error of a forecast over the product of its distances to the two that it is made from, None before one was
    measured; `in_a_row`: how many steps were forecast since.
    """

    evaluated: tuple[tuple[float, Predictions], ...] = ()
    curvature: torch.Tensor | None = None
    in_a_row: int = 0

    def step(
        self,
        sigma: float,
        x: torch.Tensor,
        evaluate: Callable[[], Predictions],
        guided: Guided,
        *,
        evaluated: bool = False,
    ) -> tuple[Predictions, "Forecast"]:
        """The predictions for latents x (b, ...) at sigma, and what is known after it.

        `evaluated`: has them evaluated in any case, as they are before three steps were. Steps with as little noise, or
        less, are forgotten: a sampling that goes back to more of it goes on from there.
        """
        known = replace(self, evaluated=tuple(step for step in self.evaluated if step[0] > sigma))
        if len(known.evaluated) < 2:
            return known._evaluate(sigma, evaluate)
        forecast = known._forecast(sigma)
        if not evaluated and known._is_near(sigma, x, guided(forecast)):
            return forecast, replace(known, in_a_row=known.in_a_row + 1)
        now, after = known._evaluate(sigma, evaluate)
        error = _norm(guided(forecast) - guided(now))
        return now, replace(after, curvature=error / known._distances(sigma))

    def _evaluate(self, sigma: float, evaluate: Callable[[], Predictions]) -> tuple[Predictions, "Forecast"]:
        now = evaluate()
        return now, Forecast((*self.evaluated[-1:], (sigma, now)), self.curvature)

    def _forecast(self, sigma: float) -> Predictions:
        (first, before), (second, last) = self.evaluated
        weight = (sigma - first) / (second - first)
        return tuple(torch.lerp(*pair, weight) for pair in zip(before, last, strict=True))

    def _is_near(self, sigma: float, x: torch.Tensor, forecast: torch.Tensor) -> bool:
        """Whether a forecast can be taken for the guided prediction."""
        if self.in_a_row >= MOST_IN_A_ROW or self.curvature is None:
            return False
        # The one value of it that is read back from the device.
        return bool(self.curvature * self._distances(sigma) <= TOLERANCE * _norm(x - forecast))

    def _distances(self, sigma: float) -> float:
        """The product of those to the two evaluations before. What is far away, as the first step of zero terminal SNR
        is, tells little of how predictions curve here, and counts as nearer."""
        before, last = (abs(sigma - step) for step, _ in self.evaluated)
        return last * min(before, _FAR * last)


def _norm(values: torch.Tensor) -> torch.Tensor:
    """(), fp32."""
    return values.float().norm()

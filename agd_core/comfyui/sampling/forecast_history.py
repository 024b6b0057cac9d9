"""What the steps of a sampling have shown so far, from which others are forecast."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...forecast import Forecast, Guided, Predictions
from .cond_batch import CondBatch


@dataclass
class ForecastHistory:
    """Forecasts are of steps with less and less noise. Asked again at a level, of other latents, all is evaluated.

    `sigma`: of the last step; `asked`: what was asked for there, but the latents; `there` and `before`: for each of the
    latents (b, ...) that were asked for at that level, and at the one before; `was_forecast`: whether the last
    predictions were.
    """

    sigma: float = math.inf
    asked: tuple | None = None
    there: list[tuple[torch.Tensor, Forecast]] = field(default_factory=list)
    before: list[tuple[torch.Tensor, Forecast]] = field(default_factory=list)
    was_forecast: bool = False

    def predictions(
        self, batch: CondBatch, scales: tuple, evaluate: Callable[[], Predictions], guided: Guided
    ) -> list[torch.Tensor]:
        """(b, c, h, w) each, the caller's own. `scales`: of the guidance, with others of which nothing is forecast from
        these; `evaluate` and `guided`: as `Forecast.step` has them."""
        sigma = batch.sigma
        asked = (batch.x.shape, scales, *(tuple(cond["uuid"] for cond in own or ()) for own in batch.conds))
        if asked != self.asked:
            self.there, self.before, self.sigma = [], [], math.inf
        again = sigma >= self.sigma
        if sigma != self.sigma:
            self.there, self.before = [], self.there
        found, after = self._nearest(batch.x).step(sigma, batch.x, evaluate, guided, evaluated=again)
        self.there.append((batch.x.clone(), after))
        self.sigma, self.asked, self.was_forecast = sigma, asked, after.in_a_row > 0
        return [each.clone() for each in found]  # other nodes may change one in place

    def _nearest(self, x: torch.Tensor) -> Forecast:
        """That of the step before; where it was asked for several latents, of those nearest to x."""
        if len(self.before) > 1:
            return min(self.before, key=lambda latents: (latents[0] - x).norm().item())[1]
        return self.before[0][1] if self.before else Forecast()

"""What the steps of a sampling with adapters have shown so far, from which others are forecast."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...prediction_forecast import PredictionForecast
from .cond_batch import CondBatch


@dataclass
class PredictionHistory:
    """Forecasts are of steps with less and less noise. Asked again at a level, of other latents, all is evaluated.

    `sigma`: of the last step; `conditions`: what was asked for there, but the latents; `forecasts`: one for each of the
    latents (b, ...) that were asked for; `was_forecast`: whether the last prediction was.
    """

    sigma: float = math.inf
    conditions: tuple | None = None
    forecasts: list[tuple[torch.Tensor, PredictionForecast]] = field(default_factory=list)
    was_forecast: bool = False

    def prediction(self, batch: CondBatch, omegas: list, evaluate: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The guided prediction (b, c, h, w), of the adapters at these `omegas`; `evaluate()` gives it."""
        sigma = batch.sigma
        prompts = (tuple(cond["uuid"] for cond in own or ()) for own in batch.conds)
        conditions = (batch.x.shape, tuple(omegas), *prompts)
        if conditions != self.conditions:
            self.forecasts, self.sigma = [], math.inf
        again = sigma >= self.sigma
        prediction, after = self._nearest(batch.x).step(sigma, batch.x, evaluate, evaluated=again)
        if sigma != self.sigma:
            self.forecasts = []
        self.forecasts.append((batch.x.clone(), after))
        self.sigma, self.conditions, self.was_forecast = sigma, conditions, after.in_a_row > 0
        return prediction

    def _nearest(self, x: torch.Tensor) -> PredictionForecast:
        """That of the step before; where it was asked for several latents, of those nearest to x."""
        if len(self.forecasts) > 1:
            return min(self.forecasts, key=lambda latents: (latents[0] - x).norm().item())[1]
        return self.forecasts[0][1] if self.forecasts else PredictionForecast()

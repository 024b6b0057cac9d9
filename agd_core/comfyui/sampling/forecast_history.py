"""What the steps of a training-free sampling have shown so far, from which others are forecast."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...forecast import ForecastGuidance
from .cond_batch import CondBatch


@dataclass
class ForecastHistory:
    """Where a sampler asks several times at a noise level, as second-order ones do, each of these has a history of its
    own. Nothing is forecast where it goes back to more noise, nor from other conditions.

    `sigma`: of the last step; `conditions`: the shape of its latents, and the conditions that were asked for; `here`:
    what each time of asking at this level has shown, `before`: the same of the level before.
    """

    sigma: float = math.inf
    conditions: tuple | None = None
    here: list[ForecastGuidance] = field(default_factory=list)
    before: list[ForecastGuidance] = field(default_factory=list)

    def predictions(
        self, batch: CondBatch, evaluate: Callable[[], list[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With the prompt and with the negative, (b, c, h, w) each; `evaluate()` gives both."""
        conditions = (batch.x.shape, *(tuple(cond["uuid"] for cond in own or ()) for own in batch.conds))
        if conditions != self.conditions:
            self.here, self.before, self.sigma = [], [], math.inf
        if batch.sigma != self.sigma:
            self.here, self.before = [], self.here
        known = self.before[: len(self.here) + 1] or [ForecastGuidance()]
        predictions, after = known[-1].step(batch.sigma, evaluate, evaluate_both=batch.sigma > self.sigma)
        self.here.append(after)
        self.sigma, self.conditions = batch.sigma, conditions
        return predictions

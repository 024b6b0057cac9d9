"""What the steps of a training-free sampling have shown so far, from which the next ones' predictions are estimated."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...alternating import AlternatingGuidance
from .cond_batch import CondBatch
from .schedule import percent_of_sigma

_ABOVE_THE_SCHEDULE = 1.001  # times its largest sigma, where positions mean nothing


@dataclass
class EstimateHistory:
    """Estimates are of steps with less and less noise, made from one to the next only.

    `sigma`: of the last step; `conditions`: the shape of its latents, and the conditions that were asked for;
    `guidances`: one for each of the latents (b, ...) that were asked for.
    """

    sigma: float = math.inf
    conditions: tuple | None = None
    guidances: list[tuple[torch.Tensor, AlternatingGuidance]] = field(default_factory=list)

    def predictions(
        self, batch: CondBatch, evaluate: Callable[..., list[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """With the prompt and with the negative, (b, c, h, w) each; `evaluate`: as `AlternatingGuidance` calls it."""
        sigma, schedule = batch.sigma, batch.model.model_sampling
        conditions = (batch.x.shape, *(tuple(cond["uuid"] for cond in own or ()) for own in batch.conds))
        # Asked again at a level, of other latents, both are evaluated.
        in_order = sigma < self.sigma and self.conditions in (None, conditions)
        guidance = self._nearest(batch.x).copy() if in_order else AlternatingGuidance()
        outside = sigma > _ABOVE_THE_SCHEDULE * float(schedule.sigma_max)
        position = percent_of_sigma(schedule, sigma)
        predictions = guidance(position, evaluate, evaluate_both=not in_order or outside)
        if sigma != self.sigma or self.conditions != conditions:
            self.guidances.clear()
        self.guidances.append((batch.x.clone(), guidance))
        self.sigma, self.conditions = sigma, conditions
        return predictions

    @property
    def has_guidance(self) -> bool:
        """Whether the last predictions differ, which they don't before the first estimate."""
        return self.guidances[-1][1].delta is not None

    @property
    def estimates_disagree(self) -> bool:
        return any(guidance.estimates_disagree for _, guidance in self.guidances)

    def _nearest(self, x: torch.Tensor) -> AlternatingGuidance:
        """That of the step before; where it was asked for several latents, of those nearest to x."""
        if len(self.guidances) > 1:
            return min(self.guidances, key=lambda latents: (latents[0] - x).norm().item())[1]
        return self.guidances[0][1] if self.guidances else AlternatingGuidance()

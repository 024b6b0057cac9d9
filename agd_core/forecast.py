"""CFG in fewer evaluations for any model, with nothing trained: some steps' predictions are forecast from earlier ones.

Where a sampling goes smoothly, both predictions of CFG follow from those of the steps before. A step that is forecast
evaluates nothing; the next one evaluates both. To evaluate one of them at each step instead costs as much and is worse:
the other's error is multiplied by the guidance scale, and it is where the prompt decides what the picture shows, in
the noisy half, that the two part in ways that no history tells.

Forecasts are linear in sigma. Their error is known, for it is measured at every evaluation, and expected to grow with
the distance to the last one. Where it would be large, at the start, in short schedules, or with noise that a sampler
adds, both predictions are evaluated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

# The largest error of a forecast, as a share of the largest difference that both predictions have had. The difference
# is all that CFG adds, so this is a share of it whatever the model, the latents and the guidance scale are.
TOLERANCE = 0.15


@dataclass(frozen=True)
class _Step:
    """At `sigma`: the prediction `with_prompt` (b, ...), and its `difference` (b, ...) to the one with the negative."""

    sigma: float
    with_prompt: torch.Tensor
    difference: torch.Tensor

    @property
    def predictions(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.with_prompt, self.with_prompt - self.difference


@dataclass(frozen=True)
class ForecastGuidance:
    """What a sampling has shown so far.

    `evaluated`: its last steps that were evaluated, with less and less noise; `growth`: the error that a
    forecast of the last one has, over its distance to the one before; `largest`: the largest norm of a difference;
    `was_forecast`: whether the last step was.
    """

    evaluated: tuple[_Step, ...] = ()
    growth: float = math.inf
    largest: float = 0.0
    was_forecast: bool = False

    def step(
        self, sigma: float, evaluate: Callable[[], list[torch.Tensor]], *, evaluate_both: bool = False
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], "ForecastGuidance"]:
        """The predictions (with the prompt, with the negative) at sigma, (b, ...) each, and what is known after it.

        `evaluate()` gives both. Two steps in a row are never forecast, nor is one with `evaluate_both`, nor one before
        three were evaluated. Steps with as little noise, or less, are forgotten: a sampling that goes back to more of
        it goes on from there.
        """
        known = replace(self, evaluated=tuple(step for step in self.evaluated if step.sigma > sigma))
        if not evaluate_both and known._can_forecast(sigma):
            return known._forecast(sigma).predictions, replace(known, was_forecast=True)
        with_prompt, with_negative = evaluate()
        return (with_prompt, with_negative), known._after(_Step(sigma, with_prompt, with_prompt - with_negative))

    def _can_forecast(self, sigma: float) -> bool:
        if self.was_forecast or len(self.evaluated) < 2:
            return False
        # An error of second order grows with the square; this is safer, and right where the step before the last is far
        # away, as the first one of zero terminal SNR is.
        return self.growth * (self.evaluated[-1].sigma - sigma) <= TOLERANCE * self.largest

    def _forecast(self, sigma: float) -> _Step:
        """Linear in sigma. Of the difference that over sigma^2 is, the difference of both scores: it changes least."""
        before, last = self.evaluated[-2:]
        weight = (sigma - before.sigma) / (last.sigma - before.sigma)
        first, second = (step.difference * (sigma / step.sigma) ** 2 for step in (before, last))
        with_prompt = torch.lerp(before.with_prompt, last.with_prompt, weight)
        return _Step(sigma, with_prompt, torch.lerp(first, second, weight))

    def _after(self, now: _Step) -> "ForecastGuidance":
        """With a step that was evaluated, from which the error of a forecast of it is known."""
        growth, largest = self.growth, max(self.largest, _norm(now.difference))
        if len(self.evaluated) > 1:
            forecast = self._forecast(now.sigma)
            pairs = (forecast.with_prompt, now.with_prompt), (forecast.difference, now.difference)
            error = max(_norm(found - true) for found, true in pairs)
            growth = error / (self.evaluated[-1].sigma - now.sigma)
        return ForecastGuidance((*self.evaluated[-1:], now), growth, largest)


def _norm(values: torch.Tensor) -> float:
    return values.float().norm().item()

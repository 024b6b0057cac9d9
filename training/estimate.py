"""A measured value and how sure it is: means and ratios over the same images, each with its standard error."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error over the images; None where they are too few to tell."""

    value: float
    se: float | None

    def __str__(self) -> str:
        return self.text(3)

    def text(self, digits: int) -> str:
        """With so many digits after the point."""
        return f"{self.value:.{digits}f}" + ("" if self.se is None else f" ± {self.se:.{digits}f}")


def mean(values: torch.Tensor) -> Estimate:
    """values (images,); an image that has none is NaN."""
    values = values[~values.isnan()]
    return Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Of the same images under several omegas, so that the errors don't average out."""
    return weighted_sum([(estimate, 1 / len(estimates)) for estimate in estimates])


def weighted_sum(estimates: Sequence[tuple[Estimate, float]]) -> Estimate:
    """The sum of estimates of the same images, each times its weight."""
    value = sum(estimate.value * weight for estimate, weight in estimates)
    errors = [estimate.se * weight for estimate, weight in estimates if estimate.se is not None]
    return Estimate(value, sum(errors) if len(errors) == len(estimates) else None)


def of_sums(function: Callable[[torch.Tensor], torch.Tensor], now: torch.Tensor, before: torch.Tensor) -> Estimate:
    """function(sum now / sum before), with the jackknife's standard error: now and before (images,)."""
    value, images = function(now.sum() / before.sum()).item(), len(now)
    rest = before.sum() - before
    if images < 2 or not math.isfinite(value) or not (rest > 0).all():
        return Estimate(value, None)
    without = function((now.sum() - now).clamp_min(0) / rest)  # each image left out in turn
    return Estimate(value, math.sqrt((images - 1) * without.var(correction=0).item()))


def ratio_of_sums(now: torch.Tensor, before: torch.Tensor) -> Estimate:
    """sum now / sum before, as `of_sums`: (images,) each."""
    return of_sums(lambda ratio: ratio, now, before)


def share_closed_of(remaining: torch.Tensor, total: torch.Tensor) -> Estimate:
    """1 - sum remaining / sum total, as `of_sums`: (images,) each."""
    return of_sums(lambda still_open: 1 - still_open, remaining, total)


def ratio(one: Estimate, other: Estimate) -> Estimate:
    """Of two that were measured apart; the error, to first order, is known where both are."""
    value = one.value / other.value
    if one.se is None or other.se is None:
        return Estimate(value, None)
    return Estimate(value, math.hypot(one.se, value * other.se) / abs(other.value))

"""How good a set of pictures is, from their features, with standard errors. Torch only."""

import functools
import math
from typing import NamedTuple

import torch

from comfyui_agd.examples.toy.judge import frechet_distance
from comfyui_agd.examples.toy.standard_errors import jackknife, mean_and_error

NEIGHBOURS = 3


def frechet(features: torch.Tensor, reference: torch.Tensor, *, paired: bool = False) -> tuple[float, float]:
    """Fréchet distance (Heusel et al. 2017) of features (n, d) to a reference (m, d), and its standard error.

    `paired`: the reference's rows belong to the same prompts and noise, and are left out together with them.
    """

    def distance(own: torch.Tensor) -> float:
        return frechet_distance(features[own], reference[own] if paired else reference)

    return jackknife(distance, len(features))


def frechet_above(features: torch.Tensor, other: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """By how much the distance of `features` (n, d) to the reference is larger than that of `other` (n, d), and its
    standard error: much smaller than either's, for the rows of both belong to the same prompts and noise.
    """

    def difference(own: torch.Tensor) -> float:
        return frechet_distance(features[own], reference) - frechet_distance(other[own], reference)

    return jackknife(difference, len(features))


class Reference(NamedTuple):
    """Features (m, d) of real pictures, and the `radii` (m,) around them."""

    features: torch.Tensor
    radii: torch.Tensor


def radii(features: torch.Tensor, neighbours: int = NEIGHBOURS) -> torch.Tensor:
    """The distance of each feature (n, d) to its k-th nearest other one: (n,)."""
    return torch.cdist(features, features).kthvalue(min(neighbours + 1, len(features)), dim=1).values  # 1st: itself


def covered(features: torch.Tensor, others: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Which features (n, d) lie within the radius (m,) of one of the `others` (m, d): bool (n,)."""
    return (torch.cdist(features, others) <= radius).any(1)


def precision(features: torch.Tensor, reference: Reference) -> tuple[float, float]:
    """Improved precision (Kynkäänniemi et al. 2019, arXiv 1904.06991): the share of samples (n, d) that look real."""
    return mean_and_error(covered(features, reference.features, reference.radii))


def recall(features: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Improved recall (ibid.): the share of the reference (m, d) that the samples (n, d) reach."""
    return jackknife(functools.partial(_recall, features, reference), len(features))


def _recall(features: torch.Tensor, reference: torch.Tensor, own: torch.Tensor) -> float:
    return covered(reference, features[own], radii(features[own])).float().mean().item()


def relative_distance(own: torch.Tensor, target: torch.Tensor, far: torch.Tensor) -> tuple[float, float]:
    """RMS distance of latents (n, c, h, w) to the target's over that of the `far` ones, and its standard error. The
    rows belong to the same prompts and noise.
    """
    off, largest = ((latents - target).flatten(1).square().sum(1) for latents in (own, far))
    return jackknife(lambda kept: (off[kept].sum() / largest[kept].sum()).sqrt().item(), len(own))


class UnwantedSeen(NamedTuple):
    """Whether something unwanted is seen without and with the negative prompt that names it: bool (n,) each."""

    without: torch.Tensor
    with_negative: torch.Tensor


def share_of_reduction(own: UnwantedSeen, cfg: UnwantedSeen) -> tuple[float, float]:
    """The share by which something becomes rarer by naming it in the negative prompt, over the share that CFG achieves
    for the same prompts and noise, and the standard error. A share, for without the negative prompt the methods don't
    draw it equally often.
    """

    def reduction(seen: UnwantedSeen, kept: torch.Tensor) -> float:
        before = seen.without[kept].float().mean()
        return (1 - seen.with_negative[kept].float().mean() / before).item() if before else math.nan

    def share(kept: torch.Tensor) -> float:
        of_cfg = reduction(cfg, kept)
        return reduction(own, kept) / of_cfg if of_cfg else math.nan

    return jackknife(share, len(own.without))

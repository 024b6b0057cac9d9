"""How sure one may be of a mean, of a share, and of a statistic of many samples. Torch only."""

import math
from collections.abc import Callable

import torch

BLOCKS = 16  # that the jackknife leaves out in turn


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean of independent values (n,) and its standard error; of yes and no (0, 1) that is the binomial one.

    A single value has none: nan.
    """
    values = values.double()
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return values.mean().item(), error


def share_error(share: float, count: int) -> float:
    """The standard error of a share of `count` (Agresti and Coull 1998): not 0 where all or none of them were seen."""
    adjusted = (share * count + 2) / (count + 4)
    return math.sqrt(adjusted * (1 - adjusted) / (count + 4))


def jackknife(statistic: Callable[[torch.Tensor], float], count: int) -> tuple[float, float]:
    """`statistic` of all of `count` samples, and its standard error from leaving out a block of them at a time.

    `statistic` is given the indices (n,) of the samples it may use. Blocks are consecutive samples: of other prompts
    and, where noise is drawn batch by batch, of other seeds.
    """
    everything = torch.arange(count)
    blocks = everything.tensor_split(min(BLOCKS, count))
    found = torch.tensor([statistic(everything[~torch.isin(everything, block)]) for block in blocks])
    error = ((len(blocks) - 1) / len(blocks) * (found - found.mean()).square().sum()).sqrt()
    return statistic(everything), error.item()

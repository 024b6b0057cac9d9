"""The negative prompts that guidance leads away from: how much each counts where.

An adapter is given them, not their prediction. What CFG would do with a negative's condition is done with its keys and
values: rows, areas, masks, strengths and ranges by ComfyUI's own rules.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...layers import fit_rows
from ..prompt import Prompt
from .conditions import crop, weight_of

# (tokens, height, width of the latents) -> height and width of the grid of those image tokens, None if they are none.
TokenGrid = Callable[[int, int, int], tuple[int, int] | None]


@dataclass(frozen=True)
class WeightedNegative:
    """A negative and how much it counts among all: everywhere alone where `weight` is None.

    `weight`: (b, 1, h, w) of the latents, with a time axis of video's, or (1, 1, 1, 1). Over all negatives they sum up
    to 1, and to 0 in places that none of them is for.
    """

    negative: Prompt
    weight: torch.Tensor | None = None

    def weigh(self, difference: torch.Tensor, token_grid: TokenGrid) -> torch.Tensor:
        """Its part of the difference (rows, n, w) between the attention to the prompt and to this negative."""
        if self.weight is None:
            return difference
        rows, tokens = difference.shape[:2]
        weight = self.weight.float().mean(dim=2) if self.weight.ndim == 5 else self.weight.float()  # of all frames
        grid = token_grid(tokens, *weight.shape[-2:])
        # Where another node has changed the tokens, a place in the picture can't be found among them.
        weight = F.adaptive_avg_pool2d(weight, grid if grid is not None else 1)
        return fit_rows(weight.flatten(2).transpose(1, 2), rows).to(difference) * difference

    def share(self, rows: int) -> torch.Tensor:
        """(rows, 1): how much it counts in the picture as a whole."""
        assert self.weight is not None
        return fit_rows(self.weight.float().flatten(1).mean(dim=1, keepdim=True), rows)

    def cropped(self, areas: list, shape: torch.Size) -> "WeightedNegative":
        """For an evaluation of latents of `shape` (b, c, h, w): a chunk of its rows for each of `areas`, where a
        condition has one."""
        if self.weight is None or self.weight.shape[-2:] == (1, 1):
            return self
        weight = torch.cat([crop(self.weight, area) for area in areas])
        if weight.shape[-2:] != shape[-2:]:  # another node has cut the latents into tiles, say
            weight = weight.flatten(2).mean(dim=2)[..., None, None]
        return WeightedNegative(self.negative, weight)


def relative_weights(
    prompts: list[list[dict]], x: torch.Tensor, timestep: torch.Tensor
) -> list[torch.Tensor] | list[None]:
    """How much each negative counts, as `WeightedNegative.weight`, for latents x (b, c, h, w).

    `prompts`: the conditions of each negative. [None] for the only one, where it counts the same everywhere.
    """
    weights = [[weight_of(cond, x, timestep) for cond in conds if "default" not in cond] for conds in prompts]
    if len(prompts) == 1 and any(isinstance(weight, float | int) for weight in weights[0]):
        return [None]
    # ComfyUI's default conditions are for what the others leave.
    rest = _on(x.device, 1 - sum(weight for own in weights for weight in own)).clamp(min=0)
    for own, conds in zip(weights, prompts, strict=True):
        own += [rest] * any("default" in cond for cond in conds)
    sums = [_on(x.device, sum(own)) for own in weights]
    nothing = torch.zeros((), device=x.device)
    total = sum(sums, nothing)
    relative = [torch.where(total > 0, own / total, nothing) for own in sums]
    return [weight if weight.ndim else weight.view(1, 1, 1, 1) for weight in relative]


def _on(device: torch.device, value: torch.Tensor | float) -> torch.Tensor:
    """fp32. A number is made by the device itself: sending it there would wait for all that is queued before."""
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float32)
    return torch.full((), value, device=device, dtype=torch.float32)

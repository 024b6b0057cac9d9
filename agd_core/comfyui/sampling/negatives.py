"""The negative prompts that guidance leads away from: how much each counts where.

An adapter is given them, not their prediction. What CFG would do with a negative's condition is done with its keys and
values: rows, areas, masks, strengths and ranges by ComfyUI's own rules.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from ...layers import fit_rows
from ..prompt import Prompt
from .conditions import crop, weight_of

# (image tokens, sizes of the latents: (h, w) or (t, h, w)) -> sizes of the grid that those tokens are, or the first of
# them where the network has added some to their end; None if they are no grid of the latents.
TokenGrid = Callable[[int, torch.Size], tuple[int, ...] | None]


@dataclass(frozen=True)
class WeightedNegative:
    """A negative and how much it counts among all: everywhere alone where `weight` is None.

    `weight`: (b, 1, h, w) of the latents, with a time axis of video's, or (1, 1, 1, 1). Over all negatives they sum up
    to 1, and to 0 in places that none of them is for. `unplaced` gets an entry where those can't be found among the
    tokens of an evaluation, so that the negative counts everywhere alike.
    """

    negative: Prompt
    weight: torch.Tensor | None = None
    unplaced: list[tuple[int, ...]] = field(default_factory=list, compare=False)

    def weigh(self, difference: torch.Tensor, token_grid: TokenGrid) -> torch.Tensor:
        """Its part of the difference (rows, n, w) between the attention to the prompt and to this negative."""
        if self.weight is None:
            return difference
        weight = self._by_token(difference.shape[1], token_grid)
        return fit_rows(weight, len(difference)).to(difference) * difference

    def _by_token(self, tokens: int, token_grid: TokenGrid) -> torch.Tensor:
        """(b, tokens, 1), or (b, 1, 1) where it is the same everywhere."""
        assert self.weight is not None
        weight = self.weight.float()
        everywhere = weight.flatten(2).mean(dim=2, keepdim=True)
        if weight.shape[2:].numel() == 1:
            return everywhere
        grid = token_grid(tokens, weight.shape[2:])
        if grid is None:
            self.unplaced.append((tokens, *weight.shape[2:]))
            return everywhere
        pool: Callable[..., torch.Tensor] = F.adaptive_avg_pool2d if len(grid) == 2 else F.adaptive_avg_pool3d
        placed = pool(weight, grid).flatten(2).transpose(1, 2)
        return torch.cat([placed, everywhere.expand(-1, tokens - placed.shape[1], -1)], dim=1)

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
            self.unplaced.append(tuple(shape[2:]))
            weight = weight.flatten(2).mean(dim=2)[..., None, None]
        return replace(self, weight=weight)


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

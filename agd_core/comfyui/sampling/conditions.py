"""ComfyUI's conditions: whose they are, what text they have, when and where they count."""

from typing import Any

import comfy.samplers
import torch
from comfy.samplers import CFGGuider

from .schedule import NoiseLevels


def copy_conditions(conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """A guider's conditions, for a sampling that may start again: ComfyUI changes them in place."""
    return {kind: [cond.copy() for cond in own] for kind, own in conds.items()}


def belong_to(guider: CFGGuider, kind: str, conds: list[dict] | None) -> bool:
    """Whether `conds` are of the guider's; `kind`: "positive" or "negative". Areas and windows hand on copies."""
    own = {cond["uuid"] for cond in guider.conds.get(kind) or ()}
    return bool(conds) and all(cond["uuid"] in own for cond in conds or ())


def are_prompt_and_negative(guider: CFGGuider, conds: list[list[dict] | None]) -> bool:
    """Whether these are the conditions of both predictions, or of the prompt's where no other is asked for."""
    return (
        len(conds) == 2
        and belong_to(guider, "positive", conds[0])
        and (not conds[1] or belong_to(guider, "negative", conds[1]))
    )


def tokens_of(cond: dict) -> torch.Tensor:
    """The encoded text (r, m, d), of one row or one for each latent."""
    return cond["model_conds"]["c_crossattn"].cond


def with_text(conds: list[dict] | None) -> list[dict]:
    """The conditions that have a text, which ConditioningZeroOut's is not."""
    # Not "cross_attn": for each area of the positive ComfyUI adds a copy of it with the negative's model_conds.
    return [cond for cond in conds or () if "c_crossattn" in cond["model_conds"] and tokens_of(cond).any()]


def latent_size(x: torch.Tensor, conds: list[dict] | None) -> torch.Size:
    """(h, w) of latents x (b, c, h, w) under those conditions; of several that ComfyUI has packed, the first one's."""
    packed = [
        cond["model_conds"]["latent_shapes"].cond for cond in conds or () if "latent_shapes" in cond["model_conds"]
    ]
    return (packed[0][0] if packed else x.shape)[-2:]


def mean_token(cond: dict) -> torch.Tensor:
    """(d,), fp32, on the CPU."""
    return tokens_of(cond).float().mean(dim=(0, 1)).cpu()


def is_active_at(cond: dict, timestep: torch.Tensor, levels: NoiseLevels) -> bool:
    """Whether a condition that was given a part of the sampling has this step in it."""
    start, end = cond.get("timestep_start"), cond.get("timestep_end")
    if start is None and end is None:
        return True
    sigma = levels.at(timestep)
    return (start is None or sigma <= start) and (end is None or sigma >= end)


_PLACE = ("area", "mask", "mask_strength", "strength")


def _area_and_mult(cond: dict, x: torch.Tensor, timestep: torch.Tensor) -> Any:
    """ComfyUI's area and weights of a condition, for latents x (b, c, h, w)."""
    own = {key: cond[key] for key in _PLACE if key in cond}
    return comfy.samplers.get_area_and_mult({**own, "model_conds": {}, "uuid": None}, x, timestep)


def area_of(cond: dict, x: torch.Tensor, timestep: torch.Tensor) -> list[int] | None:
    """The area that ComfyUI cuts out of x for a condition."""
    return _area_and_mult(cond, x, timestep).area


def weight_of(cond: dict, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor | float:
    """How much a condition counts: (b, 1, h, w), or one number where that is the same everywhere."""
    if "area" not in cond and "mask" not in cond:
        return cond.get("strength", 1.0)
    place = _area_and_mult(cond, x, timestep)
    weight = torch.zeros_like(x[:, :1])
    crop(weight, place.area).add_(place.mult[:, :1])
    return weight


def crop(x: torch.Tensor, area: list[int] | None) -> torch.Tensor:
    """`area`: sizes, then offsets, as ComfyUI has it, of (..., h, w), or of (..., t, h, w)."""
    if area is None:
        return x
    axes = len(area) // 2
    for axis, (size, start) in enumerate(zip(area[:axes], area[axes:], strict=True), start=-axes):
        x = x.narrow(axis, start, size)
    return x

"""The negative prompts that guidance leads away from: what the base's attentions make of them, which count where.

An adapter is given them, not their prediction. What CFG would do with a negative's condition is done with its keys and
values: rows, areas, masks, strengths and ranges by ComfyUI's own rules, and the weights that its hooks make.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.samplers import CFGGuider

from ...layers import fit_rows
from ..backbones import backbone_of

# Context windows cut a negative that has a row for each picture anew in every window; those of a few are kept.
_KEPT = 8


@dataclass
class Negative:
    """A negative prompt. `context`: (r, m, d), of one row or one for each latent; `keys_values`: what the base's
    attentions make of it, by site, (r, m, w) each.
    """

    context: torch.Tensor
    keys_values: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def look_up(self, model, device: torch.device) -> None:
        """Ask the base's layers, with the weights that they have now, for `keys_values`; `model`: a BaseModel."""
        context = self.context.to(device, model.get_dtype_inference())
        self.keys_values.update(backbone_of(model).keys_values(context))

    def of(self, name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (rows, m, w) at a site."""
        return tuple(fit_rows(value, rows) for value in self.keys_values[name])


@dataclass(frozen=True)
class Share:
    """A negative and how much it counts among all: everywhere alone where `weight` is None.

    `weight`: (b, 1, h, w) of the latents, or (1, 1, 1, 1). Over all negatives they sum up to 1, and to 0 in places that
    none of them is for.
    """

    negative: Negative
    weight: torch.Tensor | None = None

    def of_tokens(self, difference: torch.Tensor) -> torch.Tensor:
        """Its part of the difference (rows, n, w) between the attention to the prompt and to this negative."""
        if self.weight is None:
            return difference
        rows, tokens = difference.shape[:2]
        height, width = self.weight.shape[-2:]
        while height * width > tokens:  # a UNet's levels, each half of the one before
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        # Where another node has changed the tokens, a place in the picture is nowhere to be found.
        known = height * width in (1, tokens)
        weight = F.adaptive_avg_pool2d(self.weight.float(), (height, width) if known else 1)
        return fit_rows(weight.flatten(2).transpose(1, 2), rows).to(difference) * difference

    def cropped(self, areas: list, shape: torch.Size) -> "Share":
        """For an evaluation of latents of `shape` (b, c, h, w): a chunk of its rows for each of `areas`, where a
        condition has one."""
        if self.weight is None or self.weight.shape[-2:] == (1, 1):
            return self
        weight = torch.cat([_crop(self.weight, area) for area in areas])
        if weight.shape[-2:] != shape[-2:]:  # another node has cut the latents into tiles, say
            weight = weight.mean(dim=(2, 3), keepdim=True)
        return Share(self.negative, weight)


def _crop(x: torch.Tensor, area: list[int] | None) -> torch.Tensor:
    """`area`: sizes, then offsets, as ComfyUI has it, of (..., h, w)."""
    if area is None:
        return x
    (height, width), (top, left) = area[:2], area[2:]
    return x[..., top : top + height, left : left + width]


def _context(cond: dict) -> torch.Tensor:
    """Its prompt tokens (r, m, d)."""
    return cond["model_conds"]["c_crossattn"].cond


def with_context(conds: list[dict] | None) -> list[dict]:
    """The conditions that have a prompt, which ConditioningZeroOut's is not."""
    # Not "cross_attn": for each area of the positive ComfyUI adds a copy of it with the negative's model_conds.
    return [cond for cond in conds or () if "c_crossattn" in cond["model_conds"] and _context(cond).any()]


def mean_token(cond: dict) -> torch.Tensor:
    """(d,), fp32, on the CPU."""
    return _context(cond).float().mean(dim=(0, 1)).cpu()


def covers(cond: dict, timestep: torch.Tensor) -> bool:
    """Whether a condition that was given a part of the sampling has this step in it."""
    start, end = cond.get("timestep_start"), cond.get("timestep_end")
    if start is None and end is None:
        return True
    sigma = float(timestep.flatten()[0])
    return (start is None or sigma <= start) and (end is None or sigma >= end)


_PLACE = ("area", "mask", "mask_strength", "strength")


def _place(cond: dict, x: torch.Tensor, timestep: torch.Tensor):
    """ComfyUI's area and weights of a condition, for latents x (b, c, h, w)."""
    own = {key: cond[key] for key in _PLACE if key in cond}
    return comfy.samplers.get_area_and_mult({**own, "model_conds": {}, "uuid": None}, x, timestep)


def area_of(cond: dict, x: torch.Tensor, timestep: torch.Tensor) -> list[int] | None:
    """The area that ComfyUI cuts out of x for a condition."""
    return _place(cond, x, timestep).area


def _weight(cond: dict, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor | float:
    """How much a condition counts: (b, 1, h, w), or one number where that is the same everywhere."""
    if "area" not in cond and "mask" not in cond:
        return cond.get("strength", 1.0)
    place = _place(cond, x, timestep)
    weight = torch.zeros_like(x[:, :1])
    _crop(weight, place.area).add_(place.mult[:, :1])
    return weight


@dataclass
class NegativePrompts:
    """The negatives of one sampling. Keys and values are computed once, by who has them: context, rows and hooks."""

    guider: CFGGuider
    prompts: dict = field(default_factory=dict)  # whether a condition is one, by its uuid
    known: OrderedDict[tuple, tuple[torch.Tensor, Negative]] = field(default_factory=OrderedDict)

    def shares(self, model, conds: list[dict] | None, x, timestep, model_options: dict) -> tuple[Share, ...]:
        """Those of a step, for latents x (b, c, h, w). `conds`: ComfyUI's for the unconditional prediction."""
        alike: dict[tuple, list[dict]] = {}
        for cond in conds or ():
            if self._is_prompt(cond) and covers(cond, timestep) and cond.get("strength", 1.0) != 0:
                alike.setdefault((id(_context(cond)), cond.get("hooks")), []).append(cond)
        negatives = {key: self._negative(model, group[0], x, timestep, model_options) for key, group in alike.items()}
        weights = {
            key: [_weight(cond, x, timestep) for cond in group if "default" not in cond] for key, group in alike.items()
        }
        if len(alike) == 1 and any(isinstance(weight, float | int) for own in weights.values() for weight in own):
            return tuple(Share(negative) for negative in negatives.values())
        # ComfyUI's default conditions are for what the others leave.
        taken = sum(weight for own in weights.values() for weight in own)
        rest = torch.as_tensor(1 - taken, device=x.device).clamp(min=0)
        for key, group in alike.items():
            weights[key] += [rest] * any("default" in cond for cond in group)
        sums = {key: torch.as_tensor(sum(own), device=x.device, dtype=torch.float32) for key, own in weights.items()}
        total = sum(sums.values())
        nothing = torch.zeros((), device=x.device)
        parts = {key: torch.where(total > 0, own / total, nothing) for key, own in sums.items()}
        return tuple(Share(negatives[key], part if part.ndim else part.view(1, 1, 1, 1)) for key, part in parts.items())

    def _is_prompt(self, cond: dict) -> bool:
        # Read back from the device once: windows hand on copies, of the same uuid.
        if cond["uuid"] not in self.prompts:
            self.prompts[cond["uuid"]] = bool(with_context([cond]))
        return self.prompts[cond["uuid"]]

    def _negative(self, model, cond: dict, x: torch.Tensor, timestep, model_options: dict) -> Negative:
        context, hooks, rows = _context(cond), cond.get("hooks"), len(x)
        key = (id(context), hooks, rows if len(context) > 1 else 1)
        _, negative = self.known.pop(key, (None, None))
        if negative is None:
            fitted = comfy.utils.repeat_to_batch_size(context, rows) if len(context) > 1 else context
            negative = Negative(fitted)
        self.known[key] = context, negative  # with the context, for its id is another's once it is gone
        while len(self.known) > _KEPT:
            self.known.popitem(last=False)
        if not negative.keys_values or hooks is not None:  # a hook's strength may change from step to step
            _with_hooks(model, hooks, timestep, model_options)
            negative.look_up(model, x.device)
        return negative

    def trained(self, model, context: torch.Tensor, x: torch.Tensor) -> tuple[Share, ...]:
        """The unconditional (m, d) that an adapter was trained with, for a workflow without a negative."""
        key = (id(context), None, 1)
        if key not in self.known:
            negative = Negative(context[None])
            _with_hooks(model, None, None, {})
            negative.look_up(model, x.device)
            self.known[key] = context, negative
        return (Share(self.known[key][1]),)


def _with_hooks(model, hooks, timestep: torch.Tensor | None, model_options: dict) -> None:
    """Give the model the weights of a condition's hooks; ComfyUI does so again before each evaluation."""
    patcher = model.current_patcher
    if hooks is not None:
        patcher.prepare_hook_patches_current_keyframe(timestep, hooks, model_options)
    if hooks is not None or patcher.current_hooks is not None:
        patcher.apply_hooks(hooks=hooks)

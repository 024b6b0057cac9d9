"""The cache of the negatives' keys and values: computed once in a sampling, by the base's own layers."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import torch

from .cond_batch import CondBatch
from .conditions import is_active_at, tokens_of, with_text
from .negatives import Negative, WeightedNegative, relative_weights

# Context windows cut a negative that has a row for each picture again in every window; those of a few are kept.
_MAX_NEGATIVES = 8


@dataclass
class NegativeCache:
    """The negatives of one sampling, by what their keys and values depend on: tokens, hooks and rows.

    `negatives` has the tokens beside each, for their id is another's once they are gone; `have_text`: whether a
    condition has a text, by its uuid.
    """

    negatives: OrderedDict[tuple, tuple[torch.Tensor, Negative]] = field(default_factory=OrderedDict)
    have_text: dict = field(default_factory=dict)

    def weighted_negatives(self, conds: list[dict] | None, batch: CondBatch) -> tuple[WeightedNegative, ...]:
        """Those of a step. `conds`: ComfyUI's for the unconditional prediction; `batch`: what is evaluated."""
        prompts: dict[tuple, list[dict]] = {}
        for cond in conds or ():
            if self._has_text(cond) and is_active_at(cond, batch.timestep) and cond.get("strength", 1.0) != 0:
                prompts.setdefault((id(tokens_of(cond)), cond.get("hooks")), []).append(cond)
        negatives = [self._negative(own[0], batch) for own in prompts.values()]
        weights = relative_weights(list(prompts.values()), batch.x, batch.timestep)
        return tuple(WeightedNegative(*pair) for pair in zip(negatives, weights, strict=True))

    def trained_unconditional(self, context: torch.Tensor, batch: CondBatch) -> tuple[WeightedNegative, ...]:
        """The unconditional (m, d) that an adapter was trained with, for a workflow without a negative."""
        key = (id(context), None, 1)
        if key not in self.negatives:
            negative = Negative(context[None])
            _apply_hooks(None, batch)
            negative.compute_keys_values(batch.model, batch.x.device)
            self.negatives[key] = context, negative
        return (WeightedNegative(self.negatives[key][1]),)

    def _has_text(self, cond: dict) -> bool:
        # Read back from the device once: windows hand on copies, of the same uuid.
        if cond["uuid"] not in self.have_text:
            self.have_text[cond["uuid"]] = bool(with_text([cond]))
        return self.have_text[cond["uuid"]]

    def _negative(self, cond: dict, batch: CondBatch) -> Negative:
        context, hooks, rows = tokens_of(cond), cond.get("hooks"), len(batch.x)
        key = (id(context), hooks, rows if len(context) > 1 else 1)
        _, negative = self.negatives.pop(key, (None, None))
        if negative is None:
            fitted = comfy.utils.repeat_to_batch_size(context, rows) if len(context) > 1 else context
            negative = Negative(fitted)
        self.negatives[key] = context, negative
        while len(self.negatives) > _MAX_NEGATIVES:
            self.negatives.popitem(last=False)
        if not negative.keys_values or hooks is not None:  # a hook's strength may change from step to step
            _apply_hooks(hooks, batch)
            negative.compute_keys_values(batch.model, batch.x.device)
        return negative


def _apply_hooks(hooks: Any, batch: CondBatch) -> None:
    """Give the model the weights of a condition's hooks; ComfyUI does so again before each evaluation."""
    patcher = batch.model.current_patcher
    if hooks is not None:
        patcher.prepare_hook_patches_current_keyframe(batch.timestep, hooks, batch.model_options)
    if hooks is not None or patcher.current_hooks is not None:
        patcher.apply_hooks(hooks=hooks)

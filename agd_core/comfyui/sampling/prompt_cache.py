"""The cache of the prompts' keys and values: computed once in a sampling, by the base's own layers."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import torch

from ..guided_step import GuidedStep
from ..prompt import Prompt, with_tokens
from ..prompt_keys_values import compute_keys_values, depend_on_linears
from .cond_batch import CondBatch
from .conditions import is_active_at, tokens_of, with_text
from .negatives import WeightedNegative, relative_weights

# Context windows cut a negative that has a row for each picture again in every window; those of a few are kept, and in
# any case all that a step has.
_MAX_PROMPTS = 16


@dataclass
class PromptCache:
    """The prompts of one sampling, by what their keys and values depend on.

    `prompts` has the tokens beside each, for their id is another's once they are gone; `used`: those of the step, by
    their key in `prompts`; `have_text`: whether a condition has a text, by its uuid.
    """

    prompts: OrderedDict[tuple, tuple[torch.Tensor, Prompt]] = field(default_factory=OrderedDict)
    used: set[tuple] = field(default_factory=set)
    have_text: dict = field(default_factory=dict)

    def weighted_negatives(
        self, conds: list[dict] | None, batch: CondBatch, step: GuidedStep
    ) -> tuple[WeightedNegative, ...]:
        """Those of a step. `conds`: ComfyUI's for the unconditional prediction; `batch`: what is evaluated; `step`: its
        adapters, as far as they don't need the negatives."""
        of_prompt: dict[tuple, list[dict]] = {}
        for cond in conds or ():
            if (
                self._has_text(cond)
                and is_active_at(cond, batch.timestep, batch.levels)
                and cond.get("strength", 1.0) != 0
            ):
                of_prompt.setdefault((id(tokens_of(cond)), cond.get("hooks")), []).append(cond)
        negatives = [self._prompt(own[0], batch, step) for own in of_prompt.values()]
        weights = relative_weights(list(of_prompt.values()), batch.x, batch.timestep)
        return tuple(WeightedNegative(*pair) for pair in zip(negatives, weights, strict=True))

    def trained_unconditional(
        self, context: torch.Tensor, batch: CondBatch, step: GuidedStep
    ) -> tuple[WeightedNegative, ...]:
        """The unconditional (m, d) that an adapter was trained with, for a workflow without a negative."""
        key = (id(context), None, 1, _linears_of(batch, step))
        if key not in self.prompts:
            # What else there is, is the positive's.
            tokens, positive = context[None], _arguments_of(batch.conds[0][0], 1) if batch.conds[0] else None
            prompt = Prompt(with_tokens(positive, tokens) if positive else {"c_crossattn": tokens})
            _apply_hooks(None, batch)
            compute_keys_values(prompt, batch.model, batch.x, step)
            self.prompts[key] = context, prompt
        self._use(key, *self.prompts[key])
        return (WeightedNegative(self.prompts[key][1]),)

    def positives(self, batch: CondBatch, step: GuidedStep) -> dict[Any, Prompt]:
        """Those of the positive conditions, by their uuid, where a base's attentions need them kept."""
        if not (step.guides_attention and depend_on_linears(batch.model)):
            return {}
        active = [cond for cond in batch.conds[0] or () if is_active_at(cond, batch.timestep, batch.levels)]
        return {cond["uuid"]: self._prompt(cond, batch, step) for cond in active}

    def end_step(self) -> None:
        """Called when a step has all of its prompts: forgets those that were used longest ago."""
        while len(self.prompts) > max(_MAX_PROMPTS, len(self.used)):
            self.prompts.popitem(last=False)
        self.used.clear()

    def _use(self, key: tuple, context: torch.Tensor, prompt: Prompt) -> None:
        self.prompts[key] = context, prompt
        self.prompts.move_to_end(key)
        self.used.add(key)

    def _has_text(self, cond: dict) -> bool:
        # Read back from the device once: windows hand on copies, of the same uuid.
        if cond["uuid"] not in self.have_text:
            self.have_text[cond["uuid"]] = bool(with_text([cond]))
        return self.have_text[cond["uuid"]]

    def _prompt(self, cond: dict, batch: CondBatch, step: GuidedStep) -> Prompt:
        context, hooks, rows = tokens_of(cond), cond.get("hooks"), len(batch.x)
        key = (id(context), hooks, rows if len(context) > 1 else 1, _linears_of(batch, step))
        _, prompt = self.prompts.get(key, (None, None))
        if prompt is None:
            prompt = Prompt(_arguments_of(cond, rows if len(context) > 1 else 1))
        self._use(key, context, prompt)
        if prompt.lacks(step.guided_layers()) or hooks is not None:  # a hook's strength may change from step to step
            _apply_hooks(hooks, batch)
            compute_keys_values(prompt, batch.model, batch.x, step)
        return prompt


def _arguments_of(cond: dict, rows: int) -> dict[str, Any]:
    """A condition as arguments of `apply_model` for so many rows."""
    made = {key: value.process_cond(batch_size=rows, area=None) for key, value in cond["model_conds"].items()}
    arguments = {key: value.cond for key, value in made.items()}
    arguments["c_crossattn"] = comfy.utils.repeat_to_batch_size(tokens_of(cond), rows)
    return arguments


def _linears_of(batch: CondBatch, step: GuidedStep) -> tuple:
    """What in a step's changes of linear layers keys and values depend on: their scales, by the device's own numbers
    (`StepBuilder.tensors` has one for each)."""
    if not depend_on_linears(batch.model):
        return ()
    return tuple((id(each.adapter), id(each.omega), id(each.strength)) for each in step.active if each.changes_linears)


def _apply_hooks(hooks: Any, batch: CondBatch) -> None:
    """Give the model the weights of a condition's hooks; ComfyUI does so again before each evaluation."""
    patcher = batch.model.current_patcher
    if hooks is not None:
        patcher.prepare_hook_patches_current_keyframe(batch.timestep, hooks, batch.model_options)
    if hooks is not None or patcher.current_hooks is not None:
        patcher.apply_hooks(hooks=hooks)

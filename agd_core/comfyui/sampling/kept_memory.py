"""Room for what is kept of prompts during a sampling, so that ComfyUI leaves it free when it loads the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..prompt_keys_values import depend_on_linears
from .applied_adapter import AppliedAdapter


@dataclass(frozen=True)
class KeptMemory:
    """PREPARE_SAMPLING wrapper: for the time of it, the base says that a sampling takes so much more."""

    adapters: list[AppliedAdapter]

    def __call__(self, executor, model: ModelPatcher, noise_shape, conds: dict, *args, **kwargs) -> Any:
        base, kept = model.model, self.bytes(model, conds)
        required, before = base.memory_required, vars(base).get("memory_required")
        base.memory_required = lambda *given, **named: required(*given, **named) + kept
        try:
            return executor(model, noise_shape, conds, *args, **kwargs)
        finally:
            del base.memory_required
            if before is not None:
                base.memory_required = before

    def bytes(self, model: ModelPatcher, conds: dict) -> int:
        """Of the keys and values of all prompts, in the dtype that the model computes in."""
        channels = max((_guided_channels(applied) for applied in self.adapters), default=0)
        dtype: torch.dtype = model.model.get_dtype_inference()
        kinds = ("positive", "negative") if depend_on_linears(model.model) else ("negative",)
        return sum(2 * channels * tokens * dtype.itemsize for tokens in _tokens(conds, kinds))


def _guided_channels(applied: AppliedAdapter) -> int:
    """Of all attentions that the adapter works in."""
    return sum(applied.info.config.guided_widths)


def _tokens(conds: dict, kinds: tuple[str, ...]) -> Iterator[int]:
    """How many each condition has, in all of its rows."""
    for kind in kinds:
        for cond in conds.get(kind) or ():
            if isinstance(tokens := cond.get("cross_attn"), torch.Tensor):
                yield tokens.shape[0] * tokens.shape[1]

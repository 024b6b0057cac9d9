"""Counting what a sampler really costs: rows that the model evaluates."""

from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from torch import nn

from .running_blocks import listed_blocks, watched
from .sampling.compile_guard import is_compiled


class RowCounter:
    """`rows` holds the batch size of every evaluation of the model since the last `clear`.

    An APPLY_MODEL wrapper, for the evaluations of some families never come through another. What a step cache then
    leaves out is not counted: that shows by a block of the network that has run before and doesn't.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._block: nn.Module | None = None

    def clear(self) -> None:
        self.rows.clear()

    @property
    def total(self) -> int:
        return sum(self.rows)

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ) -> Any:
        given = (x, t, c_concat, c_crossattn, control, transformer_options)
        blocks = self._blocks(executor.class_obj.diffusion_model, transformer_options)
        ran: list[nn.Module] = []
        with watched(blocks, ran.append):
            result = executor(*given, **kwargs)
        if ran or not blocks:
            self.rows.append(x.shape[0])
        self._block = ran[0] if ran else self._block
        return result

    def _blocks(self, network: nn.Module, transformer_options: dict) -> list[nn.Module]:
        """One that runs in every evaluation, or, before any has run, all that might."""
        if self._block is None:
            return listed_blocks(network, transformer_options)
        return [] if is_compiled(transformer_options) else [self._block]


def counted(model: comfy.model_patcher.ModelPatcher) -> tuple[comfy.model_patcher.ModelPatcher, RowCounter]:
    """A clone of `model` that counts, and its counter. Evaluations per step = total / (batch * steps)."""
    clone, counter = model.clone(), RowCounter()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "agd_row_counter", counter)
    return clone, counter

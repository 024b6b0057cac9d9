"""Counting what a sampler really costs: rows that the model evaluates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from torch import nn

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
        blocks = [] if is_compiled(transformer_options) else self._blocks(executor.class_obj.diffusion_model)
        with _first_to_run(blocks) as ran:
            result = executor(*given, **kwargs)
        if ran or not blocks:
            self.rows.append(x.shape[0])
        self._block = ran[0] if ran else self._block
        return result

    def _blocks(self, network: nn.Module) -> list[nn.Module]:
        """One that runs in every evaluation, or, before any has run, all that might."""
        if self._block is not None:
            return [self._block]
        lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
        return [block for own in lists for block in own]


@contextmanager
def _first_to_run(blocks: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Inside, the list gets those of `blocks` that run, in their order."""
    ran: list[nn.Module] = []
    handles = [block.register_forward_pre_hook(lambda module, inputs: ran.append(module)) for block in blocks]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def counted(model: comfy.model_patcher.ModelPatcher) -> tuple[comfy.model_patcher.ModelPatcher, RowCounter]:
    """A clone of `model` that counts, and its counter. Evaluations per step = total / (batch * steps)."""
    clone, counter = model.clone(), RowCounter()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "agd_row_counter", counter)
    return clone, counter

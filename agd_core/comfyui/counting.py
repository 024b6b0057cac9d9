"""Counting what a sampler really costs: rows that reach the diffusion model's forward."""

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP


class RowCounter:
    """`rows` holds the batch size of every call of the diffusion model since the last `clear`."""

    def __init__(self):
        self.rows: list[int] = []

    def clear(self) -> None:
        self.rows.clear()

    @property
    def total(self) -> int:
        return sum(self.rows)

    def __call__(self, executor, x, *args, **kwargs):
        self.rows.append(x.shape[0])
        return executor(x, *args, **kwargs)


def counted(model: comfy.model_patcher.ModelPatcher) -> tuple[comfy.model_patcher.ModelPatcher, RowCounter]:
    """A clone of `model` that counts, and its counter. Evaluations per step = total / (batch * steps)."""
    clone, counter = model.clone(), RowCounter()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "agd_row_counter", counter)
    return clone, counter

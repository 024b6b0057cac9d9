"""Evaluations of as many rows at a time as there is memory for."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..agd_core.text import logger
from .finite import base_prediction
from .model import Denoiser, DeviceMemory, Prompt

log = logger(__name__)
Result = TypeVar("Result")


def retry_on_oom(memory: DeviceMemory, name: str, evaluate: Callable[[int], Result], rows: int) -> tuple[Result, int]:
    """(`evaluate(rows)`, rows), with the rows halved as often as memory runs out. `evaluate` starts anew each time.

    `name`: what is evaluated, for the log.
    """
    while True:
        try:
            return evaluate(rows), rows
        except Exception as error:
            if not memory.is_out_of_memory(error) or rows == 1:
                raise
        # Outside of `except`, for the exception keeps the failed try's tensors alive.
        rows //= 2
        memory.free_unused()
        log.warning("AGD: out of memory; %s goes on from the same step with %d rows at a time.", name, rows)


class BothPredictions:
    """The base's conditional and unconditional prediction. `rows`: evaluated at once, halved when memory runs out."""

    def __init__(self, denoiser: Denoiser, memory: DeviceMemory, rows: int):
        self.denoiser, self.memory, self.rows = denoiser, memory, rows

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, positive: list[Prompt], negative: list[Prompt]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """f(x, sigma, c) and f(x, sigma, c_neg), on the CPU: both in one batch as far as memory allows.

        Raises `BaseNotFinite`.
        """
        x, sigma, prompts = torch.cat([x, x]), torch.cat([sigma, sigma]), [*positive, *negative]

        def evaluate(rows: int) -> torch.Tensor:
            denoised = []
            for i in range(0, len(x), rows):
                part = slice(i, i + rows)
                denoised.append(base_prediction(self.denoiser, x[part], sigma[part], prompts[part]))
            return torch.cat(denoised)

        both, self.rows = retry_on_oom(self.memory, "the teacher", evaluate, self.rows)
        cond, uncond = both.chunk(2)
        return cond, uncond

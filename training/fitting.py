"""Evaluations in as many rows at a time as fit into memory."""

import logging
from collections.abc import Callable

import torch

from .host import Host, Prompt

log = logging.getLogger(__name__)


def as_fits(host: Host, who: str, evaluate: Callable, rows: int) -> tuple:
    """(`evaluate(rows)`, rows), with the rows halved as often as memory runs out. `evaluate` starts anew each time."""
    while True:
        try:
            return evaluate(rows), rows
        except Exception as error:
            if not host.out_of_memory(error) or rows == 1:
                raise
        # Outside of `except`, for the exception keeps the failed try's tensors alive.
        rows //= 2
        host.free_unused_memory()
        log.warning("AGD: out of memory; %s goes on from the same step with %d rows at a time.", who, rows)


class Teacher:
    """The base with either prompt. `rows`: evaluated at once, halved when memory runs out."""

    def __init__(self, host: Host, rows: int):
        self.host, self.rows = host, rows

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, positive: list[Prompt], negative: list[Prompt]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """f(x, sigma, c) and f(x, sigma, c_neg), on the CPU: both branches in one batch as far as memory allows."""
        x, sigma, prompts = torch.cat([x, x]), torch.cat([sigma, sigma]), [*positive, *negative]

        def evaluate(rows: int) -> torch.Tensor:
            parts = range(0, len(x), rows)
            return torch.cat([self.host.denoise(*(v[i : i + rows] for v in (x, sigma, prompts))).cpu() for i in parts])

        found, self.rows = as_fits(self.host, "the teacher", evaluate, self.rows)
        return found.chunk(2)

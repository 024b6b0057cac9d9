"""How much of the gap an adapter closes, on prompts and noise that no training saw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..agd_core.adapter import Adapter
from ..agd_core.guidance import direction_cosine, gap_closed
from .host import Condition, Host
from .pool import Visit, ask_teacher, euler_step


@dataclass(frozen=True)
class Evaluation:
    """Per omega, over all states of the CFG trajectories; `by_sigma` lists (sigma, gap closed) along them."""

    gap_closed: dict[float, float]
    direction_cosine: dict[float, float]
    by_sigma: dict[float, list[tuple[float, float]]]

    def summary(self) -> dict:
        """For the adapter file: keys are omegas as text, as JSON wants them."""
        return {
            "gap_closed": {f"{omega:g}": round(value, 4) for omega, value in self.gap_closed.items()},
            "direction_cosine": {f"{omega:g}": round(value, 4) for omega, value in self.direction_cosine.items()},
        }


@torch.no_grad()
def evaluate(
    host: Host,
    adapter: Adapter,
    positive: Sequence[Condition],
    negative: Condition,
    shape: tuple[int, int, int],
    omegas: Sequence[float],
    *,
    steps: int = 20,
    scheduler: str = "normal",
    seed: int = 1,
    batch: int = 8,
) -> Evaluation:
    """Follow the teacher's own Euler trajectories, one per condition and omega, and compare at every step.

    Spends len(omegas) * len(positive) * steps * 3 evaluations (rows). Call it inside the host's session.
    """
    sigmas = host.sigmas(scheduler, steps)
    gap, cosine, by_sigma = {}, {}, {}
    for omega in omegas:
        states = [[] for _ in range(steps)]  # per step: (student, cond, target) of each batch
        for first in range(0, len(positive), batch):
            conditions = list(positive[first : first + batch])
            rows = len(conditions)
            generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
            noise = torch.randn(rows, *shape, generator=generator).to(host.device)
            x = host.start(noise, sigmas[:1].expand(rows))
            for i in range(steps):
                sigma, sigma_next = (s.expand(rows).to(host.device) for s in (sigmas[i], sigmas[i + 1]))
                omegas_of_rows = torch.full((rows,), float(omega), device=host.device)
                visit = Visit(torch.arange(rows), x, sigma, omegas_of_rows, conditions, [negative] * rows)
                teacher = ask_teacher(host, visit)
                student = host.student(adapter, x, sigma, conditions, omegas_of_rows)
                states[i].append((student.cpu(), teacher.cond.cpu(), teacher.target.cpu()))
                still = torch.zeros(rows, dtype=torch.bool, device=host.device)
                x = euler_step(x, teacher.target, sigma, sigma_next, still, torch.zeros_like(x))
        at_step = [[torch.cat(part) for part in zip(*batches, strict=True)] for batches in states]
        everything = [torch.cat(part) for part in zip(*at_step, strict=True)]
        gap[omega], cosine[omega] = gap_closed(*everything), direction_cosine(*everything)
        by_sigma[omega] = [(sigmas[i].item(), gap_closed(*parts)) for i, parts in enumerate(at_step)]
    return Evaluation(gap, cosine, by_sigma)

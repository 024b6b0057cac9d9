"""How much of the gap an adapter closes, on prompts and noise that no training saw."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..agd_core.adapter import Adapter
from ..agd_core.guidance import GuidanceRule, direction_cosine, gap_closed
from .config import TrainConfig
from .host import Host, Prompt
from .solvers import solver_step


@dataclass(frozen=True)
class Evaluation:
    """Per omega, over all states of the teacher's trajectories; `by_sigma` lists (sigma, gap closed) along them, at the
    noise levels where the teacher guides."""

    gap_closed: dict[float, float]
    direction_cosine: dict[float, float]
    by_sigma: dict[float, list[tuple[float, float]]]

    @property
    def score(self) -> float:
        """One number to compare adapters by: the mean gap closed over the omegas."""
        return sum(self.gap_closed.values()) / len(self.gap_closed)

    def summary(self) -> dict:
        """For the adapter file: keys are omegas as text, as JSON wants them."""
        return {
            "gap_closed": {f"{omega:g}": round(value, 4) for omega, value in self.gap_closed.items()},
            "direction_cosine": {f"{omega:g}": round(value, 4) for omega, value in self.direction_cosine.items()},
        }

    def sigmas(self) -> dict:
        """`by_sigma` as JSON data."""
        return {
            f"{omega:g}": [[round(sigma, 4), round(value, 4)] for sigma, value in pairs]
            for omega, pairs in self.by_sigma.items()
        }


@dataclass(frozen=True)
class State:
    """A batch of states on the teacher's trajectories: x, cond, target (b, c, h, w) on the CPU, sigma and omega."""

    x: torch.Tensor
    cond: torch.Tensor
    target: torch.Tensor
    sigma: float
    omega: float
    positive: list[Prompt]
    negative: list[Prompt]


def omegas_of(config: TrainConfig) -> list[float]:
    """The guidance scales to measure at: two between the smallest and the largest, evenly in log omega, and that."""
    low, high = math.log(max(1.0, config.omega_min)), math.log(config.omega_max)
    return sorted({round(math.exp(low + (high - low) * i / 3), 1) for i in (1, 2)} | {config.omega_max})


@torch.no_grad()
def follow_teacher(
    host: Host,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    shape: tuple[int, int, int],
    omegas: Sequence[float],
    *,
    rule: GuidanceRule = GuidanceRule(),
    steps: int = 20,
    keep: int | None = None,
    scheduler: str = "normal",
    seed: int = 1,
    batch: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[State]:
    """The states on the teacher's own Euler trajectories, one per prompt and omega, to `evaluate` adapters at.

    `negative`: a prompt each, in the order of `positive`.

    Spends len(omegas) * len(positive) * steps * 2 evaluations (rows), once; `keep` of the steps, evenly spread, are
    kept (default: all). Call it inside the host's session.
    """
    sigmas, states, done = host.sigmas(scheduler, steps), [], 0
    kept = set(torch.linspace(0, steps - 1, keep or steps).round().int().tolist())
    for omega in omegas:
        for first in range(0, len(positive), batch):
            prompts, unwanted = (list(each[first : first + batch]) for each in (positive, negative))
            rows = len(prompts)
            # A generator per prompt: the states don't depend on how many rows are evaluated at once.
            seeds = [seed * 1_000_003 + i for i in range(first, first + rows)]
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
            x = host.start(torch.stack(noise), sigmas[:1].expand(rows))
            for i in range(steps):
                sigma, sigma_next = (s.expand(rows) for s in (sigmas[i], sigmas[i + 1]))
                cond = host.denoise(x, sigma, prompts).cpu()
                uncond = host.denoise(x, sigma, unwanted).cpu()
                target = rule(x, sigma, cond, uncond, torch.full((rows,), float(omega)))
                if i in kept:
                    states.append(State(x, cond, target, sigmas[i].item(), omega, prompts, unwanted))
                x = solver_step(x, target, sigma, sigma_next)
                done += rows
                progress(done, len(omegas) * len(positive) * steps)
    return states


@torch.no_grad()
def predict(
    host: Host,
    adapter: Adapter,
    states: Sequence[State],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[torch.Tensor]:
    """f_psi at each of those states, (b, c, h, w) on the CPU. Call it inside the host's session."""
    students = []
    for i, state in enumerate(states, 1):
        rows = len(state.positive)
        sigma, omega = torch.full((rows,), state.sigma), torch.full((rows,), float(state.omega))
        students.append(host.student(adapter, state.x, sigma, state.positive, state.negative, omega).cpu())
        progress(i, len(states))
    return students


def evaluate(
    host: Host,
    adapter: Adapter,
    states: Sequence[State],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """How the adapter does at those states: one evaluation (row) each. Call it inside the host's session."""
    found: dict[float, dict[float, list]] = {}  # omega -> sigma -> (student, cond, target) of each batch
    for state, student in zip(states, predict(host, adapter, states, progress), strict=True):
        found.setdefault(state.omega, {}).setdefault(state.sigma, []).append((student, state.cond, state.target))
    gap, cosine, by_sigma = {}, {}, {}
    for omega, at_sigma in found.items():
        joined = {s: [torch.cat(part) for part in zip(*batches, strict=True)] for s, batches in at_sigma.items()}
        everything = [torch.cat(part) for part in zip(*joined.values(), strict=True)]
        gap[omega], cosine[omega] = gap_closed(*everything), direction_cosine(*everything)
        guided = {sigma: parts for sigma, parts in joined.items() if not torch.equal(parts[1], parts[2])}
        by_sigma[omega] = [(sigma, gap_closed(*parts)) for sigma, parts in guided.items()]
    return Evaluation(gap, cosine, by_sigma)


@torch.no_grad()
def sample(
    host: Host,
    prompt: Prompt,
    negative: Prompt,
    shape: tuple[int, int, int],
    omega: float,
    adapter: Adapter | None,
    *,
    rule: GuidanceRule = GuidanceRule(),
    steps: int = 20,
    seed: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """A latent (1, c, h, w) by Euler's method: with the adapter in one evaluation per step, or by the teacher."""
    sigmas, scale = host.sigmas("normal", steps), torch.tensor([float(omega)])
    x = host.start(torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)), sigmas[:1])
    for i in range(steps):
        sigma = sigmas[i : i + 1]
        if adapter is not None:
            denoised = host.student(adapter, x, sigma, [prompt], [negative], scale).cpu()
        else:
            cond, uncond = (host.denoise(x, sigma, [which]).cpu() for which in (prompt, negative))
            denoised = rule(x, sigma, cond, uncond, scale)
        x = solver_step(x, denoised, sigma, sigmas[i + 1 : i + 2])
        progress(i + 1, steps)
    return x

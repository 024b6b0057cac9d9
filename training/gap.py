"""How much of the gap an adapter closes at given states: on prompts and noise that no training saw."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..agd_core.adapter import Adapter
from ..agd_core.guidance import GapErrors, GuidanceRule, gap_errors, mean_cosine, share_closed
from ..agd_core.seeds import seeded_generator
from .config import TrainConfig
from .estimate import share_closed_of
from .finite import base_prediction, check_target
from .model import Denoiser, ProgressCallback, Prompt, Shape, no_progress
from .solvers import solver_step

CFG = GuidanceRule()


@dataclass(frozen=True)
class TrajectoryState:
    """States on the teacher's trajectories: x, cond, target (b, c, h, w) on the CPU, all at one sigma and omega."""

    x: torch.Tensor
    cond: torch.Tensor
    target: torch.Tensor
    sigma: float
    omega: float
    positive: list[Prompt]
    negative: list[Prompt]


@dataclass(frozen=True)
class Trajectories:
    """Which of the teacher's trajectories are followed: by Euler's method, one for each prompt and omega.

    `keep` of the steps, evenly spread, are kept (default: all): of these the ones `where` the noise levels are learnt.
    """

    shape: Shape
    omegas: Sequence[float]
    rule: GuidanceRule = CFG
    steps: int = 20
    keep: int | None = None
    scheduler: str = "normal"
    seed: int = 1
    where: Callable[[torch.Tensor], torch.Tensor] = torch.ones_like  # sigma (n,) -> whether it is learnt (n,)

    def kept_steps(self, sigmas: torch.Tensor) -> set[int]:
        """`sigmas`: (steps + 1,) noise levels."""
        spread = torch.linspace(0, self.steps - 1, self.keep or self.steps).round().int().tolist()
        return {step for step in spread if self.where(sigmas[step])}

    def can_measure(self, denoiser: Denoiser) -> bool:
        """Whether the rule guides at any of the kept steps."""
        sigmas = denoiser.sigmas(self.scheduler, self.steps)
        kept = sigmas[sorted(self.kept_steps(sigmas))]
        return bool(self.rule.guides_at(kept).any())

    def noise(self, prompts: range) -> torch.Tensor:
        """(b, c, h, w). A generator per prompt: it doesn't depend on how many rows are evaluated at once."""
        generators = [seeded_generator(self.seed, i) for i in prompts]
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in generators])


@torch.no_grad()
def follow_teacher(
    denoiser: Denoiser,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    trajectories: Trajectories,
    batch: int = 8,
    progress: ProgressCallback = no_progress,
) -> list[TrajectoryState]:
    """The states on the teacher's own trajectories, to `evaluate` adapters at.

    `negative`: a prompt each, in the order of `positive`; `batch`: trajectories at once.

    Spends len(omegas) * len(positive) * steps * 2 evaluations (rows), once. Call it inside the denoiser's session.
    Raises `BaseNotFinite`.
    """
    states, done, total = [], 0, len(trajectories.omegas) * len(positive) * trajectories.steps
    sigmas = denoiser.sigmas(trajectories.scheduler, trajectories.steps)
    kept = trajectories.kept_steps(sigmas)
    progress(done, total)
    for omega in trajectories.omegas:
        for first in range(0, len(positive), batch):
            prompts, unwanted = list(positive[first : first + batch]), list(negative[first : first + batch])
            rows = len(prompts)
            x = denoiser.start(trajectories.noise(range(first, first + rows)), sigmas[:1].expand(rows))
            for i in range(trajectories.steps):
                sigma, sigma_next = sigmas[i].expand(rows), sigmas[i + 1].expand(rows)
                cond, uncond = (base_prediction(denoiser, x, sigma, each) for each in (prompts, unwanted))
                target = trajectories.rule(x, sigma, cond, uncond, torch.full((rows,), float(omega)))
                check_target(target, trajectories.rule.name, omega)
                if i in kept:
                    states.append(TrajectoryState(x, cond, target, sigmas[i].item(), omega, prompts, unwanted))
                x = solver_step(x, target, sigma, sigma_next)
                done += rows
                progress(done, total)
    return states


@torch.no_grad()
def predict(
    denoiser: Denoiser,
    adapter: Adapter,
    states: Sequence[TrajectoryState],
    progress: ProgressCallback = no_progress,
) -> list[torch.Tensor]:
    """f_psi at each of those states, (b, c, h, w) on the CPU. Call it inside the denoiser's session."""
    students, done, total = [], 0, sum(len(state.positive) for state in states)
    progress(done, total)
    for state in states:
        rows = len(state.positive)
        sigma, omega = torch.full((rows,), state.sigma), torch.full((rows,), float(state.omega))
        students.append(denoiser.student(adapter, state.x, sigma, state.positive, state.negative, omega).cpu())
        done += rows
        progress(done, total)
    return students


def errors_by_omega(
    states: Sequence[TrajectoryState], students: Sequence[torch.Tensor]
) -> dict[float, dict[float, GapErrors]]:
    """omega -> sigma -> the errors of the students' predictions, (images,) each.

    Raises `ValueError` where there is no guidance at all.
    """
    found: dict[float, dict[float, list[GapErrors]]] = {}
    for state, student in zip(states, students, strict=True):
        at_sigma = found.setdefault(state.omega, {}).setdefault(state.sigma, [])
        at_sigma.append(gap_errors(student, state.cond, state.target))
    by_omega = {omega: {s: joined(batches) for s, batches in by_sigma.items()} for omega, by_sigma in found.items()}
    for by_sigma in by_omega.values():
        if joined(by_sigma.values()).total.sum() == 0:
            raise ValueError(
                "Guidance changes nothing here, so it can't be measured: negative prompts equal the prompts."
            )
    return by_omega


def joined(errors: Iterable[GapErrors]) -> GapErrors:
    """One after the other."""
    return GapErrors(*(torch.cat(parts) for parts in zip(*errors, strict=True)))


@dataclass(frozen=True)
class Evaluation:
    """Per omega, over all states of the teacher's trajectories; `by_sigma` lists (sigma, gap closed) along them, at the
    noise levels where the teacher guides; `gap_closed_se`: standard errors over prompts, where these are enough."""

    gap_closed: dict[float, float]
    direction_cosine: dict[float, float]
    by_sigma: dict[float, list[tuple[float, float]]]
    gap_closed_se: dict[float, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """One number to compare adapters by: the mean gap closed over the omegas."""
        return sum(self.gap_closed.values()) / len(self.gap_closed)

    def summary(self) -> dict[str, dict[str, float]]:
        """For the adapter file: keys are omegas as text, as JSON wants them."""
        return {
            "gap_closed": {f"{omega:g}": round(value, 4) for omega, value in self.gap_closed.items()},
            "direction_cosine": {f"{omega:g}": round(value, 4) for omega, value in self.direction_cosine.items()},
            "gap_closed_se": {f"{omega:g}": round(value, 4) for omega, value in self.gap_closed_se.items()},
        }

    def sigmas(self) -> dict[str, list[list[float]]]:
        """`by_sigma` as JSON data."""
        return {
            f"{omega:g}": [[round(sigma, 4), round(value, 4)] for sigma, value in pairs]
            for omega, pairs in self.by_sigma.items()
        }


@dataclass(frozen=True)
class Measurement:
    """An evaluation while training, as the run's files and the adapter's have it: by omega as text.

    Ranks that don't measure know the score alone.
    """

    step: int
    score: float
    gap_closed: dict[str, float] = field(default_factory=dict)
    direction_cosine: dict[str, float] = field(default_factory=dict)
    gap_closed_se: dict[str, float] = field(default_factory=dict)


def evaluate(
    denoiser: Denoiser,
    adapter: Adapter,
    states: Sequence[TrajectoryState],
    progress: ProgressCallback = no_progress,
) -> Evaluation:
    """How the adapter does at those states: one evaluation (row) each. Call it inside the denoiser's session."""
    gap, cosine, by_sigma, errors_of_gap = {}, {}, {}, {}
    for omega, levels in errors_by_omega(states, predict(denoiser, adapter, states, progress)).items():
        together = joined(levels.values())
        gap[omega], cosine[omega] = share_closed(together), mean_cosine(together)
        by_sigma[omega] = [(sigma, share_closed(errors)) for sigma, errors in levels.items() if errors.total.sum() > 0]
        if (error := _error_of_gap(levels.values())) is not None:
            errors_of_gap[omega] = error
    return Evaluation(gap, cosine, by_sigma, errors_of_gap)


def _error_of_gap(levels: Iterable[GapErrors]) -> float | None:
    """The standard error over prompts of the gap closed at several noise levels, of each the errors (prompts,)."""
    remaining, total, _ = (torch.stack(parts, dim=1).double().sum(1) for parts in zip(*levels, strict=True))
    return share_closed_of(remaining, total).se


def omegas_of(config: TrainConfig) -> list[float]:
    """The guidance scales to measure at: two between the smallest and the largest, evenly in log omega, and that.

    At 1 there is no guidance to measure.
    """
    low, high = math.log(max(1.0, config.omega_min)), math.log(config.omega_max)
    between = {round(math.exp(low + (high - low) * i / 3), 1) for i in (1, 2)}
    return sorted({omega for omega in between if omega > 1} | {config.omega_max})

"""Live trajectories: the states that a guided sampler visits, rolled out while training and never stored.

Each of the pool's places is one guided trajectory of the base under its own prompts, omega, schedule and solver, at its
own phase; a share of them follows the student instead of the teacher ("on policy"). A training step takes a column of
places, one for each row of the batch, evaluates the conditional and the unconditional prediction there, which give the
target, and with it moves the trajectories on: one pair of evaluations serves both, and as many further steps with other
omegas as `reuse` says.

Everything random of a row comes from the row's own generator, so that a run does not depend on how many processes share
its batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..agd_core.guidance import GuidanceRule, per_row
from .config import TrainConfig
from .model import Denoiser, EncodedPrompts, ProgressCallback, Prompt
from .seeds import generator_of
from .solvers import Ancestral, SecondOrder, solver_step

# (x, sigma, positive, negative) -> the conditional and the unconditional prediction: `memory.BothPredictions`.
Predict = Callable[[torch.Tensor, torch.Tensor, list[Prompt], list[Prompt]], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Batch:
    """States to learn from, with both predictions of the base, which give the teacher's.

    x, cond, uncond: (b, c, h, w) denoised by the base with either prompt, on the CPU; sigma, omega: (b,); `positive`,
    `negative`: (b,) indices into the prompts. `column` is the pool's, or None where the states were visited before.
    `rule`: what the teacher makes of both predictions.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    omega: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor
    cond: torch.Tensor
    uncond: torch.Tensor
    column: int | None = None
    rule: GuidanceRule = field(default_factory=GuidanceRule)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Any], rule: GuidanceRule) -> "Batch":
        """One that was visited before, from its tensors by name."""
        return cls(**tensors, rule=rule)

    @functools.cached_property
    def target(self) -> torch.Tensor:
        """The teacher's guided prediction, (b, c, h, w)."""
        return self.rule(self.x, self.sigma, self.cond, self.uncond, self.omega)


def draw_omega(config: TrainConfig, generator: torch.Generator) -> torch.Tensor:
    """One guidance scale, as the config has them drawn: ()."""
    share = torch.rand((), generator=generator)
    low, high = torch.tensor(config.omega_min), torch.tensor(config.omega_max)
    if config.omega_sampling == "log_uniform":
        return torch.exp(low.log() + share * (high.log() - low.log()))
    return low + share * (high - low)


class BatchSource(Protocol):
    """Where a training step takes its batch from: `TrajectoryPool`, or `recording.RecordedBatches`."""

    def fill(self, progress: ProgressCallback = ...) -> int:
        """Get ready for the first batch. Returns the base's evaluations that were spent (rows)."""

    def next(self, step: int) -> Batch:
        """The batch of an optimiser step. Nothing but generators has changed until `advance`."""

    def restore_generators(self) -> None:
        """As if the last `next`, whose batch was not learnt from, had not been."""

    def advance(self, batch: Batch, student: torch.Tensor, progress: float) -> int:
        """Go on from the batch, given the student's predictions there. Returns the evaluations (rows) that it cost.

        `progress`: how far training is, 0 to 1.
        """

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(what all ranks have alike, what each has for its own rows, rows first)."""

    def load_state_dict(self, shared: dict[str, torch.Tensor], per_row: dict[str, torch.Tensor]) -> None: ...


class TrajectoryPool:
    """Columns of trajectories, one for each row of the batch. Online training takes its batches from here."""

    _NUMBERS = ("positive", "negative", "scheduler", "solver", "steps", "position")

    def __init__(self, denoiser: Denoiser, prompts: EncodedPrompts, config: TrainConfig, rows: range, predict: Predict):
        """`rows`: of the batch, those of this process."""
        self.denoiser, self.prompts, self.config, self.predict = denoiser, prompts, config, predict
        shapes = [denoiser.latent_shape(width, height) for width, height in config.buckets()]
        columns, count = max(config.pool, len(shapes)), len(rows)
        self.shapes = [shapes[column % len(shapes)] for column in range(columns)]
        self.chooser = generator_of(config.seed)
        self.generators = [generator_of(config.seed * 1_000_003 + row + 1) for row in rows]
        self._sigmas = [
            {steps: denoiser.sigmas(name, steps) for steps in range(config.steps_min, config.steps_max + 1)}
            for name in config.schedulers
        ]
        self.x = [torch.zeros(count, *shape) for shape in self.shapes]
        self.before = [torch.zeros(count, *shape) for shape in self.shapes]  # the last denoised predictions
        self.numbers = {name: torch.zeros(count, columns, dtype=torch.long) for name in self._NUMBERS}
        self.omega, self.policy = torch.ones(count, columns), torch.ones(count, columns)
        self.visited: list[Batch] = []  # the last batches, for `reuse`

    def fill(self, progress: ProgressCallback = lambda done, total: None) -> int:
        """Start every trajectory and bring it to a random phase. Returns the base's evaluations spent (rows)."""
        spent, total = 0, len(self.shapes) * (self.config.steps_max - 1)
        for column in range(len(self.shapes)):
            phases = torch.tensor([self._start(row, column) for row in range(len(self.generators))])
            for i in range(int(phases.max())):
                rows = (phases > i).nonzero()[:, 0]
                batch = self._evaluate(column, rows)
                self._step(column, rows, batch, batch.target)
                spent += 2 * len(rows)
                progress(column * (self.config.steps_max - 1) + i + 1, total)
            spent += self._reach_what_is_learnt(column)
        progress(total, total)
        return spent

    def next(self, step: int) -> Batch:
        self._before = [generator.get_state() for generator in (self.chooser, *self.generators)]
        if step % self.config.reuse == 0:
            return self._evaluate(self._choose(len(self.shapes)), torch.arange(len(self.generators)))
        visited = self.visited[self._choose(len(self.visited))]
        omega = torch.stack([draw_omega(self.config, generator) for generator in self.generators])
        return replace(visited, omega=omega, column=None)

    def restore_generators(self) -> None:
        for generator, state in zip((self.chooser, *self.generators), self._before, strict=True):
            generator.set_state(state)

    def advance(self, batch: Batch, student: torch.Tensor, progress: float) -> int:
        """Move the batch's trajectories on: along the teacher's guided prediction or, on policy, the student's."""
        if batch.column is None:
            return 0
        on_policy = self.config.on_policy if progress >= self.config.on_policy_from else 0
        follows = self.policy[:, batch.column] < on_policy
        denoised = torch.where(per_row(follows, student).bool(), student, batch.target)
        self._step(batch.column, torch.arange(len(self.generators)), batch, denoised)
        if self.config.reuse > 1:
            # More than are rolled out at a time: neighbours on a trajectory are learnt by heart, as one batch would be.
            self.visited = [*self.visited, batch][-self.config.reuse_from :]
        return 2 * len(batch.x) + self._reach_what_is_learnt(batch.column)

    def _reach_what_is_learnt(self, column: int) -> int:
        """Bring trajectories on to where the config learns, through what another expert evaluates, and start those anew
        that are past it. Returns the evaluations (rows) that it cost. Raises `ValueError` where they never get there.
        """
        rows, spent = torch.arange(len(self.generators)), 0
        if self.config.learns_everywhere:
            return spent
        for _ in range(2 * self.config.steps_max + 1):
            sigma = self._sigma(rows, column)
            for row in rows[sigma < self.config.sigma_from].tolist():
                self._start(row, column)
            before = rows[~self.config.learns_at(self._sigma(rows, column))]
            if not len(before):
                return spent
            batch = self._evaluate(column, before)
            self._step(column, before, batch, batch.target)
            spent += 2 * len(before)
        raise ValueError(
            f"No state of a trajectory is at a noise level from {self.config.sigma_from:g} to {self.config.sigma_to:g} "
            f"in {self.config.steps_min} to {self.config.steps_max} steps: choose a wider range, or more steps."
        )

    # Saved under the keys that earlier versions gave them, so that their runs and recordings go on.

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        rows = {**self.numbers, "omega": self.omega, "policy": self.policy}
        rows["generators"] = torch.stack([generator.get_state() for generator in self.generators])
        rows |= {f"x{i}": x for i, x in enumerate(self.x)} | {f"before{i}": x for i, x in enumerate(self.before)}
        for i, batch in enumerate(self.visited):
            rows |= {f"seen{i}.{name}": getattr(batch, name) for name in _SAVED}
        return {"chooser": self.chooser.get_state(), "seen": torch.tensor(len(self.visited))}, rows

    def load_state_dict(self, shared: dict[str, torch.Tensor], per_row: dict[str, torch.Tensor]) -> None:
        self.chooser.set_state(shared["chooser"])
        for generator, state in zip(self.generators, per_row["generators"], strict=True):
            generator.set_state(state.clone())  # torch crashes on a view into a larger tensor
        self.numbers = {name: per_row[name].clone() for name in self._NUMBERS}
        self.omega, self.policy = per_row["omega"].clone(), per_row["policy"].clone()
        self.x = [per_row[f"x{i}"].clone() for i in range(len(self.shapes))]
        self.before = [per_row[f"before{i}"].clone() for i in range(len(self.shapes))]
        visited = [{name: per_row[f"seen{i}.{name}"] for name in _SAVED} for i in range(int(shared["seen"]))]
        self.visited = [Batch.from_tensors(tensors, self.config.rule) for tensors in visited]

    def _choose(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.chooser))

    def _start(self, row: int, column: int) -> int:
        """Begin a trajectory. Returns a random phase, to bring the first one of each place to."""
        config, generator = self.config, self.generators[row]
        counts = {"positive": len(self.prompts.positive), "negative": len(self.prompts.negative)}
        counts |= {"scheduler": len(config.schedulers), "solver": len(config.solvers)}
        for name, count in counts.items():
            self.numbers[name][row, column] = torch.randint(count, (), generator=generator)
        steps = int(torch.randint(config.steps_min, config.steps_max + 1, (), generator=generator))
        self.numbers["steps"][row, column], self.numbers["position"][row, column] = steps, 0
        self.omega[row, column] = draw_omega(self.config, generator)
        self.policy[row, column] = torch.rand((), generator=generator)
        noise = torch.randn(1, *self.shapes[column], generator=generator)
        sigma = self._sigma(torch.tensor([row]), column)
        self.x[column][row] = self.denoiser.start(noise, sigma)[0].cpu()
        return int(torch.randint(steps, (), generator=generator))

    def _sigma(self, rows: torch.Tensor, column: int, offset: int = 0) -> torch.Tensor:
        """The noise levels (b,) of those rows' trajectories; `offset` 1 is the next one."""
        at = [self.numbers[name][rows, column].tolist() for name in ("scheduler", "steps", "position")]
        chosen = zip(*at, strict=True)
        return torch.stack([self._sigmas[schedule][steps][max(0, i + offset)] for schedule, steps, i in chosen])

    def _evaluate(self, column: int, rows: torch.Tensor) -> Batch:
        """Those rows of a column, with both predictions of the base."""
        x, sigma, omega = self.x[column][rows], self._sigma(rows, column), self.omega[rows, column]
        positive, negative = (self.numbers[name][rows, column] for name in ("positive", "negative"))
        cond, uncond = self.predict(x, sigma, *self.prompts.of_rows(positive, negative))
        return Batch(x, sigma, omega, positive, negative, cond, uncond, column=column, rule=self.config.rule)

    def _step(self, column: int, rows: torch.Tensor, batch: Batch, denoised: torch.Tensor) -> None:
        """One solver step towards `denoised`, on the CPU; finished trajectories start anew."""
        solvers = [self.config.solvers[i] for i in self.numbers["solver"][rows, column].tolist()]
        shape = self.shapes[column]
        noise = torch.stack([torch.randn(shape, generator=self.generators[row]) for row in rows.tolist()])
        second = torch.tensor([name == "dpmpp_2m" for name in solvers]) & (self.numbers["position"][rows, column] > 0)
        sigma_next, sigma_before = self._sigma(rows, column, 1), self._sigma(rows, column, -1)
        self.x[column][rows] = solver_step(
            batch.x,
            denoised,
            batch.sigma,
            sigma_next,
            Ancestral(torch.tensor([name == "euler_ancestral" for name in solvers]), noise, self.denoiser.is_flow),
            SecondOrder(second, self.before[column][rows], sigma_before),
        )
        self.before[column][rows] = denoised
        self.numbers["position"][rows, column] += 1
        for row in rows[sigma_next == 0].tolist():
            self._start(row, column)


_SAVED = ("x", "sigma", "omega", "positive", "negative", "cond", "uncond")

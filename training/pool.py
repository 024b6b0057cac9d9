"""Live trajectories: the states that a guided sampler visits, rolled out while training and never stored.

Each of the pool's places is one guided trajectory of the base under its own prompts, omega, schedule and solver, at its
own phase; a share of them follows the student instead of the teacher ("on policy"). A training step takes a column of
places, one for each row of the batch, evaluates the conditional and the unconditional prediction there, which give the
target, and with it moves the trajectories on: one pair of evaluations serves both, and as many further steps with other
omegas as `reuse` says. A column is started, each of its rows brought to a random phase, when it is first taken.

Everything random of a row comes from the row's own generator, so that a run does not depend on how many processes share
its batch.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..agd_core.guidance import GuidanceRule, per_row
from ..agd_core.seeds import seeded_generator
from .config import TrainConfig
from .finite import check_target
from .model import Denoiser, EncodedPrompts, ProgressCallback, Prompt, Shape, no_progress
from .solvers import Ancestral, SecondOrder, solver_step

# (x, sigma, positive, negative) -> the conditional and the unconditional prediction: `memory.BothPredictions`.
Predict = Callable[[torch.Tensor, torch.Tensor, list[Prompt], list[Prompt]], tuple[torch.Tensor, torch.Tensor]]


_LATENTS = ("x", "cond", "uncond")
_SAVED = ("x", "sigma", "omega", "positive", "negative", "cond", "uncond")


def kept_dtype(computes_in: torch.dtype) -> torch.dtype:
    """Of the latents of batches that are kept to come again: fp32, or where the base computes in half precision, fp16,
    as recordings are.
    """
    return torch.float32 if computes_in is torch.float32 else torch.float16


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
        """One that was visited before, from its tensors by name. Raises `ValueError` where these don't fit together."""
        numbers, rows = ("positive", "negative"), tensors["x"].shape[:1]
        for name, value in tensors.items():
            shape = tensors["x"].shape if name in _LATENTS else rows
            if value.shape != shape or value.is_floating_point() == (name in numbers):
                raise ValueError(f"{name} is of another type or shape")
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

    def next(self, step: int, progress: ProgressCallback = ...) -> Batch:
        """The batch of an optimiser step. Nothing but generators has changed until `advance`. `progress` may raise."""

    def restore_generators(self) -> None:
        """As if the last `next`, whose batch was not learnt from, had not been."""

    def advance(self, batch: Batch, student: torch.Tensor, progress: float) -> int:
        """Go on from the last `next`'s batch, given the student's predictions there. Returns the base's evaluations
        (rows) that it cost since the last batch that was learnt from.

        `progress`: how far training is, 0 to 1.
        """

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(what all ranks have alike, what each has for its own rows, rows first)."""

    def load_state_dict(self, shared: dict[str, torch.Tensor], per_row: dict[str, torch.Tensor]) -> None: ...


_NUMBERS = ("positive", "negative", "scheduler", "solver", "steps", "position")


@dataclass
class Column:
    """A trajectory for each row of the batch, all of one size.

    x, before: (b, c, h, w), where they are and the last denoised predictions; `numbers`: (b,) each, by `_NUMBERS`;
    omega, policy: (b,). `evaluations`: of the base, in rows, since the column was last learnt from.
    """

    x: torch.Tensor
    before: torch.Tensor
    numbers: dict[str, torch.Tensor]
    omega: torch.Tensor
    policy: torch.Tensor
    started: bool = False
    evaluations: int = 0

    @classmethod
    def not_started(cls, rows: int, shape: Shape) -> "Column":
        x, ones = torch.zeros(rows, *shape), torch.ones(rows)
        return cls(x, x.clone(), {name: torch.zeros(rows, dtype=torch.long) for name in _NUMBERS}, ones, ones.clone())

    def to_dict(self) -> dict[str, torch.Tensor]:
        """Its tensors by name, those of `numbers` among them."""
        return {**self.numbers, "x": self.x, "before": self.before, "omega": self.omega, "policy": self.policy}


class TrajectoryPool:
    """Columns of trajectories. Online training takes its batches from here.

    `next` moves a copy of a column on, `chosen`, and `advance` puts it in the column's place: whatever stops a run in
    between, the pool is that of after the last batch.
    """

    def __init__(self, denoiser: Denoiser, prompts: EncodedPrompts, config: TrainConfig, rows: range, predict: Predict):
        """`rows`: of the batch, those of this process. Raises `ValueError` where no trajectory gets to where the config
        learns.
        """
        self.denoiser, self.prompts, self.config, self.predict = denoiser, prompts, config, predict
        self.chooser = seeded_generator(config.seed)
        self.generators = [seeded_generator(config.seed, row + 1) for row in rows]
        self._sigmas = [
            {steps: denoiser.sigmas(name, steps) for steps in range(config.steps_min, config.steps_max + 1)}
            for name in config.schedulers
        ]
        self._learnt = [
            {steps: config.learns_at(sigmas[:-1]).nonzero()[:, 0].tolist() for steps, sigmas in of_schedule.items()}
            for of_schedule in self._sigmas
        ]
        self._check_range()
        shapes = [denoiser.latent_shape(width, height) for width, height in config.buckets()]
        columns = range(max(config.pool, len(shapes)))
        self.columns = [Column.not_started(len(rows), shapes[i % len(shapes)]) for i in columns]
        self.chosen = self.columns[0]
        self.visited: list[Batch] = []  # the last batches, for `reuse`
        self._kept_in = kept_dtype(denoiser.computes_in)

    def _check_range(self) -> None:
        config = self.config
        if not any(positions for of_schedule in self._learnt for positions in of_schedule.values()):
            raise ValueError(
                f"No step of a sampling run is at a noise level from {config.sigma_from:g} to {config.sigma_to:g} "
                f"in {config.steps_min} to {config.steps_max} steps: choose a wider range, or more steps."
            )

    def next(self, step: int, progress: ProgressCallback = no_progress) -> Batch:
        self._before = [generator.get_state() for generator in (self.chooser, *self.generators)]
        if step % self.config.reuse == 0:
            index = self._choose(len(self.columns))
            self.chosen = copy.deepcopy(self.columns[index])
            self._bring_to_what_is_learnt(self.chosen, progress)
            return replace(self._evaluate(self.chosen, self._rows()), column=index)
        visited = self.visited[self._choose(len(self.visited))]
        omega = torch.stack([draw_omega(self.config, generator) for generator in self.generators])
        return replace(visited, omega=omega, **{name: getattr(visited, name).float() for name in _LATENTS})

    def restore_generators(self) -> None:
        for generator, state in zip((self.chooser, *self.generators), self._before, strict=True):
            generator.set_state(state)

    def advance(self, batch: Batch, student: torch.Tensor, progress: float) -> int:
        """Move the batch's trajectories on: along the teacher's guided prediction or, on policy, the student's."""
        if batch.column is None:
            return 0
        column = self.chosen
        on_policy = self.config.on_policy if progress >= self.config.on_policy_from else 0
        follows = column.policy < on_policy
        denoised = torch.where(per_row(follows, student).bool(), student, batch.target)
        self._step(column, self._rows(), batch, denoised)
        self.columns[batch.column] = column
        if self.config.reuse > 1:
            # More than are rolled out at a time: neighbours on a trajectory are learnt by heart, as one batch would be.
            self.visited = [*self.visited, self._kept(batch)][-self.config.reuse_from :]
        spent, column.evaluations = column.evaluations, 0
        return spent

    def _kept(self, batch: Batch) -> Batch:
        """As it waits in system memory, and in saved states, to come again: as precise as the base computes, and
        without the target, which another omega changes.
        """
        return replace(batch, column=None, **{name: getattr(batch, name).to(self._kept_in) for name in _LATENTS})

    # Saved under the keys that earlier versions gave them, so that their runs and recordings go on.

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        columns = [column.to_dict() for column in self.columns]
        rows = {name: torch.stack([each[name] for each in columns], dim=1) for name in (*_NUMBERS, "omega", "policy")}
        rows["generators"] = torch.stack([generator.get_state() for generator in self.generators])
        rows |= {f"{name}{i}": each[name] for i, each in enumerate(columns) for name in ("x", "before")}
        for i, batch in enumerate(self.visited):
            rows |= {f"seen{i}.{name}": getattr(batch, name) for name in _SAVED}
        shared = {"chooser": self.chooser.get_state(), "seen": torch.tensor(len(self.visited))}
        shared["keeps"] = torch.tensor(self.config.reuse_from)
        return shared | {"started": torch.tensor([column.started for column in self.columns])}, rows

    def load_state_dict(self, shared: dict[str, torch.Tensor], per_row: dict[str, torch.Tensor]) -> None:
        self.chooser.set_state(shared["chooser"])
        for generator, state in zip(self.generators, per_row["generators"], strict=True):
            generator.set_state(state.clone())  # torch crashes on a view into a larger tensor
        # As many as fitted into memory when the run began: what comes again is drawn from them.
        self.config = replace(self.config, reuse_from=int(shared.get("keeps", self.config.reuse_from)))
        # Earlier versions started all columns before the first iteration.
        started = shared.get("started", torch.ones(len(self.columns), dtype=torch.bool)).tolist()
        self.columns = [
            Column(
                x=per_row[f"x{i}"].clone(),
                before=per_row[f"before{i}"].clone(),
                numbers={name: per_row[name][:, i].clone() for name in _NUMBERS},
                omega=per_row["omega"][:, i].clone(),
                policy=per_row["policy"][:, i].clone(),
                started=is_started,
            )
            for i, is_started in enumerate(started)
        ]
        # Earlier versions' recordings have some, which are of no use there.
        count = int(shared["seen"]) if self.config.reuse > 1 else 0
        visited = [{name: per_row[f"seen{i}.{name}"] for name in _SAVED} for i in range(count)]
        self.visited = [Batch.from_tensors(tensors, self.config.rule) for tensors in visited]

    def _choose(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.chooser))

    def _rows(self) -> torch.Tensor:
        return torch.arange(len(self.generators))

    def _bring_to_what_is_learnt(self, column: Column, progress: ProgressCallback) -> None:
        """Each trajectory to a random phase, if the column was not started; else on to where the config learns, maybe
        through what another expert evaluates.
        """
        if column.started:
            moves = [self._moves_to_what_is_learnt(column, row) for row in range(len(self.generators))]
        else:
            moves = [self._start(column, row) for row in range(len(self.generators))]
        column.started = True
        self._move(column, torch.tensor(moves), progress)

    def _moves_to_what_is_learnt(self, column: Column, row: int) -> int:
        """The row's solver steps to the next state that is learnt from, on a new trajectory if this one has no more."""
        position = int(column.numbers["position"][row])
        ahead = [learnt - position for learnt in self._learnt_positions(column, row) if learnt >= position]
        if ahead:
            return ahead[0]
        self._start(column, row)
        return self._learnt_positions(column, row)[0]

    def _learnt_positions(self, column: Column, row: int) -> list[int]:
        schedule, steps = (int(column.numbers[name][row]) for name in ("scheduler", "steps"))
        return self._learnt[schedule][steps]

    def _move(self, column: Column, moves: torch.Tensor, progress: ProgressCallback) -> None:
        """So many solver steps (b,) of each row along the teacher's guided prediction."""
        done, total = 0, 2 * int(moves.sum())
        for i in range(int(moves.max())):
            progress(done, total)
            rows = (moves > i).nonzero()[:, 0]
            batch = self._evaluate(column, rows)
            self._step(column, rows, batch, batch.target)
            done += 2 * len(rows)
        if total:
            progress(total, total)

    def _start(self, column: Column, row: int) -> int:
        """Begin a trajectory. Returns a random phase of it that is learnt from, for the first one of each place."""
        config, generator, numbers = self.config, self.generators[row], column.numbers
        counts = {"positive": len(self.prompts.positive), "negative": len(self.prompts.negative)}
        counts |= {"scheduler": len(config.schedulers), "solver": len(config.solvers)}
        numbers["position"][row] = 0
        while True:
            for name, count in counts.items():
                numbers[name][row] = torch.randint(count, (), generator=generator)
            numbers["steps"][row] = torch.randint(config.steps_min, config.steps_max + 1, (), generator=generator)
            if learnt := self._learnt_positions(column, row):
                break
        column.omega[row] = draw_omega(config, generator)
        column.policy[row] = torch.rand((), generator=generator)
        noise = torch.randn(1, *column.x.shape[1:], generator=generator)
        column.x[row] = self.denoiser.start(noise, self._sigma(torch.tensor([row]), column))[0].cpu()
        return learnt[int(torch.randint(len(learnt), (), generator=generator))]

    def _sigma(self, rows: torch.Tensor, column: Column, offset: int = 0) -> torch.Tensor:
        """The noise levels (b,) of those rows' trajectories; `offset` 1 is the next one."""
        at = [column.numbers[name][rows].tolist() for name in ("scheduler", "steps", "position")]
        chosen = zip(*at, strict=True)
        return torch.stack([self._sigmas[schedule][steps][max(0, i + offset)] for schedule, steps, i in chosen])

    def _evaluate(self, column: Column, rows: torch.Tensor) -> Batch:
        """Those rows of a column, with both predictions of the base."""
        x, sigma, omega = column.x[rows], self._sigma(rows, column), column.omega[rows]
        positive, negative = column.numbers["positive"][rows], column.numbers["negative"][rows]
        cond, uncond = self.predict(x, sigma, *self.prompts.of_rows(positive, negative))
        column.evaluations += 2 * len(rows)
        return Batch(x, sigma, omega, positive, negative, cond, uncond, rule=self.config.rule)

    def _step(self, column: Column, rows: torch.Tensor, batch: Batch, denoised: torch.Tensor) -> None:
        """One solver step towards `denoised`, on the CPU; finished trajectories start anew.

        Raises `TargetNotFinite`: the base would be blamed for what it predicts from there.
        """
        check_target(batch.target, self.config.teacher, self.config.omega_max)
        solvers = [self.config.solvers[i] for i in column.numbers["solver"][rows].tolist()]
        noise = torch.stack([torch.randn(column.x.shape[1:], generator=self.generators[row]) for row in rows.tolist()])
        second = torch.tensor([name == "dpmpp_2m" for name in solvers]) & (column.numbers["position"][rows] > 0)
        sigma_next, sigma_before = self._sigma(rows, column, 1), self._sigma(rows, column, -1)
        column.x[rows] = solver_step(
            batch.x,
            denoised,
            batch.sigma,
            sigma_next,
            Ancestral(torch.tensor([name == "euler_ancestral" for name in solvers]), noise, self.denoiser.is_flow),
            SecondOrder(second, column.before[rows], sigma_before),
        )
        column.before[rows] = denoised
        column.numbers["position"][rows] += 1
        for row in rows[sigma_next == 0].tolist():
            self._start(column, row)

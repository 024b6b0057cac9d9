"""Live trajectories: the states that a guided sampler visits, rolled out while training and never stored.

Each of the pool's places is one guided trajectory of the base under its own prompts, omega, schedule and solver, at its
own phase; a share of them follows the student instead of the teacher ("on policy"). A training step takes a column of
places, one per row ("lane") of the batch, asks the teacher for both branches there, which gives the target, and with it
moves the trajectories on: one pair of teacher evaluations serves both, and as many further steps with other omegas as
`reuse` says.

Everything random of a lane comes from the lane's own generator, so that a run does not depend on how many processes
share its batch.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..agd_core.guidance import GuidanceRule, per_row
from .config import TrainConfig
from .fitting import Teacher
from .host import Host, Prompt
from .solvers import solver_step


@dataclass
class Batch:
    """States to learn from, with the teacher's word on them.

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


class TrajectoryPool:
    """Columns of trajectories, a row per lane. Online training takes its batches from here."""

    _NUMBERS = ("positive", "negative", "scheduler", "solver", "steps", "position")

    def __init__(
        self,
        host: Host,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        config: TrainConfig,
        lanes: range,
        teacher: Teacher,
    ):
        self.host, self.config, self.teacher = host, config, teacher
        self.prompts = {"positive": positive, "negative": negative}
        shapes = [host.latent_shape(width, height) for width, height in config.buckets()]
        columns, rows = max(config.pool, len(shapes)), len(lanes)
        self.shapes = [shapes[column % len(shapes)] for column in range(columns)]
        self.chooser = torch.Generator().manual_seed(config.seed)
        self.generators = [torch.Generator().manual_seed(config.seed * 1_000_003 + lane + 1) for lane in lanes]
        self._sigmas = [
            {steps: host.sigmas(name, steps) for steps in range(config.steps_min, config.steps_max + 1)}
            for name in config.schedulers
        ]
        self.x = [torch.zeros(rows, *shape) for shape in self.shapes]
        self.before = [torch.zeros(rows, *shape) for shape in self.shapes]  # the last denoised predictions
        self.numbers = {name: torch.zeros(rows, columns, dtype=torch.long) for name in self._NUMBERS}
        self.omega, self.policy = torch.ones(rows, columns), torch.ones(rows, columns)
        self.seen: list[Batch] = []  # the last visits, for `reuse`

    def fill(self, progress=lambda done, total: None) -> int:
        """Start every trajectory and bring it to a random phase. Returns the teacher evaluations spent (rows)."""
        spent, total = 0, len(self.shapes) * (self.config.steps_max - 1)
        for column, shape in enumerate(self.shapes):
            phases = torch.tensor([self._start(row, column, shape) for row in range(len(self.generators))])
            for i in range(int(phases.max())):
                rows = (phases > i).nonzero()[:, 0]
                batch = self._ask(column, rows)
                self._move(batch, rows, batch.target)
                spent += 2 * len(rows)
                progress(column * (self.config.steps_max - 1) + i + 1, total)
        progress(total, total)
        return spent

    def next(self, step: int) -> Batch:
        """The batch of an optimiser step. Nothing but generators has changed until `advance`; `undo` restores them."""
        self._before = [generator.get_state() for generator in (self.chooser, *self.generators)]
        if step % self.config.reuse == 0:
            return self._ask(self._choose(len(self.shapes)), torch.arange(len(self.generators)))
        seen = self.seen[self._choose(len(self.seen))]
        omega = torch.stack([draw_omega(self.config, generator) for generator in self.generators])
        return replace(seen, omega=omega, column=None)

    def undo(self) -> None:
        """As if the last `next`, whose batch was not learnt from, had not been."""
        for generator, state in zip((self.chooser, *self.generators), self._before, strict=True):
            generator.set_state(state)

    def advance(self, batch: Batch, student: torch.Tensor, share: float) -> int:
        """Move the batch's trajectories on: along the teacher's guided prediction or, on policy, the student's.

        `share`: how far training is, 0 to 1. Returns the teacher evaluations (rows) that the batch cost.
        """
        if batch.column is None:
            return 0
        follows = self.policy[:, batch.column] < (self.config.on_policy if share >= self.config.on_policy_from else 0)
        denoised = torch.where(per_row(follows, student).bool(), student, batch.target)
        self._move(batch, torch.arange(len(self.generators)), denoised)
        if self.config.reuse > 1:
            # More than are rolled out at a time: neighbours on a trajectory are learnt by heart, as one batch would be.
            self.seen = [*self.seen, batch][-self.config.reuse_from :]
        return 2 * len(batch.x)

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(what all ranks have alike, what each has for its own lanes, lanes first)."""
        lanes = {**self.numbers, "omega": self.omega, "policy": self.policy}
        lanes["generators"] = torch.stack([generator.get_state() for generator in self.generators])
        lanes |= {f"x{i}": x for i, x in enumerate(self.x)} | {f"before{i}": x for i, x in enumerate(self.before)}
        for i, batch in enumerate(self.seen):
            lanes |= {f"seen{i}.{name}": getattr(batch, name) for name in _SEEN}
        return {"chooser": self.chooser.get_state(), "seen": torch.tensor(len(self.seen))}, lanes

    def load_state_dict(self, common: dict[str, torch.Tensor], lanes: dict[str, torch.Tensor]) -> None:
        self.chooser.set_state(common["chooser"])
        for generator, state in zip(self.generators, lanes["generators"], strict=True):
            generator.set_state(state.clone())  # torch crashes on a view into a larger tensor
        self.numbers = {name: lanes[name].clone() for name in self._NUMBERS}
        self.omega, self.policy = lanes["omega"].clone(), lanes["policy"].clone()
        self.x = [lanes[f"x{i}"].clone() for i in range(len(self.shapes))]
        self.before = [lanes[f"before{i}"].clone() for i in range(len(self.shapes))]
        seen = [{name: lanes[f"seen{i}.{name}"] for name in _SEEN} for i in range(int(common["seen"]))]
        self.seen = [Batch(**tensors, rule=self.config.rule) for tensors in seen]

    def _choose(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.chooser))

    def _start(self, row: int, column: int, shape: tuple[int, int, int]) -> int:
        """Begin a trajectory. Returns a random phase, to bring the first one of each place to."""
        config, generator = self.config, self.generators[row]
        counts = {name: len(prompts) for name, prompts in self.prompts.items()}
        counts |= {"scheduler": len(config.schedulers), "solver": len(config.solvers)}
        for name, count in counts.items():
            self.numbers[name][row, column] = torch.randint(count, (), generator=generator)
        steps = int(torch.randint(config.steps_min, config.steps_max + 1, (), generator=generator))
        self.numbers["steps"][row, column], self.numbers["position"][row, column] = steps, 0
        self.omega[row, column] = draw_omega(self.config, generator)
        self.policy[row, column] = torch.rand((), generator=generator)
        noise = torch.randn(1, *shape, generator=generator)
        rows = torch.tensor([row])
        self.x[column][row] = self.host.start(noise, self._sigma(rows, column))[0].cpu()
        return int(torch.randint(steps, (), generator=generator))

    def _sigma(self, rows: torch.Tensor, column: int, offset: int = 0) -> torch.Tensor:
        """The noise levels (b,) of those rows' trajectories; `offset` 1 is the next one."""
        at = [self.numbers[name][rows, column].tolist() for name in ("scheduler", "steps", "position")]
        chosen = zip(*at, strict=True)
        return torch.stack([self._sigmas[schedule][steps][max(0, i + offset)] for schedule, steps, i in chosen])

    def _ask(self, column: int, rows: torch.Tensor) -> Batch:
        """Those rows of a column, with the teacher's predictions."""
        x, sigma = self.x[column][rows], self._sigma(rows, column)
        drawn = {name: self.numbers[name][rows, column] for name in self.prompts}
        chosen = [[self.prompts[name][i] for i in drawn[name].tolist()] for name in ("positive", "negative")]
        cond, uncond = self.teacher(x, sigma, *chosen)
        omega = self.omega[rows, column]
        return Batch(x, sigma, omega, **drawn, cond=cond, uncond=uncond, column=column, rule=self.config.rule)

    def _move(self, batch: Batch, rows: torch.Tensor, denoised: torch.Tensor) -> None:
        """One solver step towards `denoised`, on the CPU; finished trajectories start anew."""
        column, names = batch.column, self.config.solvers
        shape, solver = self.shapes[column], [names[i] for i in self.numbers["solver"][rows, column].tolist()]
        noise = torch.stack([torch.randn(shape, generator=self.generators[row]) for row in rows.tolist()])
        sigma_next, started = self._sigma(rows, column, 1), self.numbers["position"][rows, column] > 0
        self.x[column][rows] = solver_step(
            batch.x,
            denoised,
            batch.sigma,
            sigma_next,
            ancestral=torch.tensor([name == "euler_ancestral" for name in solver]),
            noise=noise,
            second_order=torch.tensor([name == "dpmpp_2m" for name in solver]) & started,
            before=self.before[column][rows],
            sigma_before=self._sigma(rows, column, -1),
        )
        self.before[column][rows] = denoised
        self.numbers["position"][rows, column] += 1
        for row in rows[sigma_next == 0].tolist():
            self._start(row, column, shape)


_SEEN = ("x", "sigma", "omega", "positive", "negative", "cond", "uncond")

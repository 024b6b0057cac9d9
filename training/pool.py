"""Live trajectories: the states that a CFG sampler visits, rolled out while training and never stored.

Each slot of the pool is one guided trajectory of the base under its own prompt, omega, schedule and solver, at its
own phase; a share of them follows the student instead of the teacher ("on policy"). A training step takes some
slots, asks the teacher for the guided prediction there, which is the target, and with it moves the slots on: one
pair of teacher evaluations serves both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..agd_core.guidance import cfg, per_row
from .config import TrainConfig
from .host import Condition, Host


@dataclass
class Visit:
    """Some slots' states: x (b, c, h, w), sigma and omega (b,), a positive and a negative condition per row."""

    slots: torch.Tensor
    x: torch.Tensor
    sigma: torch.Tensor
    omega: torch.Tensor
    positive: list[Condition]
    negative: list[Condition]


@dataclass
class Teacher:
    """The base's word on a visit, all (b, c, h, w): unguided, and guided (the target)."""

    cond: torch.Tensor
    target: torch.Tensor


def ask_teacher(host: Host, visit: Visit) -> Teacher:
    """f(x, sigma, c) and cfg(x, sigma, c, c_neg, omega), both branches in one batch."""
    both = host.denoise(
        torch.cat([visit.x, visit.x]), torch.cat([visit.sigma, visit.sigma]), visit.positive + visit.negative
    )
    cond, uncond = both.chunk(2)
    return Teacher(cond, cfg(cond, uncond, visit.omega))


def euler_step(
    x: torch.Tensor,
    denoised: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    ancestral: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """One Euler step of dx/dsigma = (x - denoised) / sigma (Karras et al. 2022); `ancestral` rows (b,) go
    below sigma_next and add noise back up to it. sigmas: (b,)."""
    up = torch.minimum(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).clamp(min=0).sqrt())
    up = torch.where(ancestral, up, torch.zeros_like(up))
    down = (sigma_next**2 - up**2).clamp(min=0).sqrt()
    slope = (x - denoised) / per_row(sigma, x)
    return x + slope * per_row(down - sigma, x) + noise * per_row(up, x)


class TrajectoryPool:
    """`pool` times `batch` trajectories. Everything random comes from one CPU generator."""

    _STATE = ("x", "omega", "prompt", "scheduler", "steps", "position", "ancestral", "on_policy")

    def __init__(
        self,
        host: Host,
        positive: Sequence[Condition],
        negative: Sequence[Condition],
        shape: tuple[int, int, int],
        config: TrainConfig,
    ):
        self.host, self.config, self.shape = host, config, shape
        self.positive, self.negative = positive, negative
        self.size = config.pool * config.batch
        self.generator = torch.Generator().manual_seed(config.seed)
        self._schedules = [
            {steps: host.sigmas(name, steps) for steps in range(config.steps_min, config.steps_max + 1)}
            for name in config.schedulers
        ]
        self.x = torch.zeros(self.size, *shape)
        self.omega = torch.ones(self.size)
        self.ancestral, self.on_policy = torch.zeros(2, self.size, dtype=torch.bool).unbind()
        self.prompt, self.scheduler, self.steps, self.position = torch.zeros(4, self.size, dtype=torch.long).unbind()

    def fill(self, progress=lambda done, total: None) -> int:
        """Start every trajectory and bring it to a random phase. Returns the teacher evaluations spent (rows)."""
        self._restart(torch.arange(self.size))
        phase = (torch.rand(self.size, generator=self.generator) * self.steps).long()
        spent, last = 0, int(phase.max())
        for i in range(last):
            for slots in (phase > i).nonzero()[:, 0].split(self.config.batch):
                visit = self._visit(slots)
                self._move(visit, ask_teacher(self.host, visit).target)
                spent += 2 * len(slots)
            progress(i + 1, last)
        return spent

    def draw(self) -> Visit:
        """A batch of slots, none twice."""
        self._before_draw = self.generator.get_state()
        return self._visit(torch.randperm(self.size, generator=self.generator)[: self.config.batch])

    def undo_draw(self) -> None:
        """As if the last `draw`, whose visit was not used, had not been."""
        self.generator.set_state(self._before_draw)

    def advance(self, visit: Visit, target: torch.Tensor, student: torch.Tensor) -> None:
        """Move the visited slots one step on, along the teacher's guided prediction or, on policy, the student's."""
        on_policy = self.on_policy[visit.slots].to(target.device)
        self._move(visit, torch.where(per_row(on_policy, target).bool(), student.detach(), target))

    def _move(self, visit: Visit, denoised: torch.Tensor) -> None:
        """One solver step towards `denoised`; finished trajectories start anew."""
        slots = visit.slots
        self.position[slots] += 1
        sigma_next = self._sigma(slots)
        noise = torch.randn(len(slots), *self.shape, generator=self.generator)
        x, denoised = visit.x.cpu(), denoised.cpu()
        self.x[slots] = euler_step(x, denoised, visit.sigma.cpu(), sigma_next, self.ancestral[slots], noise)
        done = slots[sigma_next == 0]
        if len(done):
            self._restart(done)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self._STATE} | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name in self._STATE:
            getattr(self, name).copy_(state[name])
        self.generator.set_state(state["generator"])

    def _integers(self, low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=self.generator)

    def _restart(self, slots: torch.Tensor) -> None:
        config, count = self.config, len(slots)
        share = torch.rand(count, generator=self.generator)
        low, high = torch.tensor(config.omega_min), torch.tensor(config.omega_max)
        if config.omega_sampling == "log_uniform":
            self.omega[slots] = torch.exp(low.log() + share * (high.log() - low.log()))
        else:
            self.omega[slots] = low + share * (high - low)
        self.ancestral[slots] = torch.rand(count, generator=self.generator) < config.ancestral
        self.on_policy[slots] = torch.rand(count, generator=self.generator) < config.on_policy
        self.prompt[slots] = self._integers(0, len(self.positive), count)
        self.scheduler[slots] = self._integers(0, len(self._schedules), count)
        self.steps[slots] = self._integers(config.steps_min, config.steps_max + 1, count)
        self.position[slots] = 0
        noise = torch.randn(count, *self.shape, generator=self.generator)
        self.x[slots] = self.host.start(noise.to(self.host.device), self._sigma(slots)).cpu()

    def _sigma(self, slots: torch.Tensor) -> torch.Tensor:
        chosen = zip(self.scheduler[slots].tolist(), self.steps[slots].tolist(), self.position[slots], strict=True)
        return torch.stack([self._schedules[scheduler][steps][at] for scheduler, steps, at in chosen])

    def _visit(self, slots: torch.Tensor) -> Visit:
        prompts, device = self.prompt[slots].tolist(), self.host.device
        return Visit(
            slots,
            self.x[slots].to(device),
            self._sigma(slots).to(device),
            self.omega[slots].to(device),
            [self.positive[i] for i in prompts],
            [self.negative[i % len(self.negative)] for i in prompts],
        )

"""One training step: the student's loss on a batch, its gradients, the optimiser, the moving average."""

import math
import statistics
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from ..agd_core.guidance import balanced_weights, gaps, weighted_error
from .config import TrainConfig
from .distributed import Ranks
from .finite import Diverged, check_target
from .learning_rate import learning_rate
from .memory import retry_on_oom
from .model import Denoiser, DeviceMemory, EncodedPrompts, ProgressCallback, no_progress
from .pool import Batch
from .run_state import RunState

_LOSS_SCALE = 2.0**16  # as mixed precision training usually begins (Micikevicius et al. 2018, arXiv 1710.03740)
RECENT, _EXPLODED = 20, 20.0  # so many iterations with so many times the loss of no adapter: that won't come back


def initial_loss_scale(computes_in: torch.dtype) -> float:
    """In fp16 small gradients are lost, so the loss is multiplied by this; it is halved when large ones overflow."""
    return _LOSS_SCALE if computes_in is torch.float16 else 1.0


def _all_finite(gradients: list[torch.Tensor]) -> bool:
    """Read back from the device once: an adapter may have hundreds of parameters."""
    return bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())


class StudentLoss(NamedTuple):
    """The student's predictions (b, c, h, w) on the CPU, the loss, and the loss over that of no adapter."""

    predictions: torch.Tensor
    loss: float
    relative: float


@dataclass
class TrainingStep:
    """What a training step needs besides the run's state. `micro_batch`: rows that the student evaluates at once,
    halved when memory runs out.
    """

    denoiser: Denoiser
    memory: DeviceMemory
    prompts: EncodedPrompts
    config: TrainConfig
    ranks: Ranks
    micro_batch: int
    _relative_losses: list[float] = field(default_factory=list)

    def __call__(self, state: RunState, iterations: int, of_pool: ProgressCallback = no_progress) -> None:
        """Take the step; `iterations`: of the whole run, `of_pool`: by which the pool reports. Where either raises,
        the state is that of the step before, unless it is no longer `resumable`.
        """
        rate = learning_rate(state.step, replace(self.config, iterations=iterations))
        try:
            batch = state.source.next(state.step, of_pool)
            student = self.gradients(state, batch)
            norm = nn.utils.clip_grad_norm_(state.adapter.parameters(), self.config.clip)
            self.check(batch, student, norm, state.step)
        except BaseException:
            state.source.restore_generators()  # ComfyUI's layers raise on interrupt
            raise
        state.resumable = False
        self.optimise(state, rate)
        spent = state.source.advance(batch, student.predictions, state.step / iterations)
        state.evaluations += int(self.ranks.sum(torch.tensor(spent)))
        state.step += 1
        state.losses.append(student.loss)
        self.update_average(state)
        state.resumable = True

    def gradients(self, state: RunState, batch: Batch) -> StudentLoss:
        """Gradients of the whole batch's loss, this rank's share of it evaluated here, in parts that fit."""
        while True:
            student = self._backward(state, batch)
            if not math.isfinite(student.loss):
                return student  # no scale makes that finite
            gradients = [p.grad for p in state.adapter.parameters() if p.grad is not None]
            for gradient in gradients if state.loss_scale != 1 else []:
                gradient.div_(state.loss_scale)
            if state.loss_scale == 1 or _all_finite(gradients):
                return student
            state.loss_scale /= 2  # too large for half precision, on all ranks alike: the gradients are the sum

    def _backward(self, state: RunState, batch: Batch) -> StudentLoss:
        unit = self.denoiser.prediction_unit(batch.sigma)
        weights, of_none = self._row_weights(batch, unit)
        positive, negative = self.prompts.of_rows(batch.positive, batch.negative)

        def evaluate(rows: int) -> tuple[list[torch.Tensor], float]:
            state.optimiser.zero_grad(set_to_none=True)
            predictions, loss = [], 0.0
            for i in range(0, len(positive), rows):
                own = slice(i, i + rows)
                student = self.denoiser.student(
                    state.adapter, batch.x[own], batch.sigma[own], positive[own], negative[own], batch.omega[own]
                )
                target, of_unit, weight = (v[own].to(student) for v in (batch.target, unit, weights))
                part = weighted_error(student, target, of_unit, weight)
                (part * state.loss_scale).backward()
                predictions.append(student.detach().cpu())
                loss += part.item()
            return predictions, loss

        (predictions, loss), self.micro_batch = retry_on_oom(self.memory, "the adapter", evaluate, self.micro_batch)
        loss = self.ranks.sum(torch.tensor(loss, dtype=torch.float64)).item()
        self.ranks.sum_gradients(state.adapter.parameters())
        return StudentLoss(torch.cat(predictions), loss, loss / of_none)

    def _row_weights(self, batch: Batch, unit: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Each row's weight in the loss (b,), and the loss of an adapter that does nothing.

        That is infinite where the teacher guides none of the rows, so that no loss looks large beside it.
        """
        gap = gaps(batch.cond, batch.target, unit)
        total, count = self.ranks.sum(torch.tensor([gap.sum().item(), len(gap)], dtype=torch.float64)).tolist()
        if self.config.loss == "plain":
            weight = torch.full_like(gap, 1 / (count * batch.x[0].numel()))
        else:
            weight = balanced_weights(gap, torch.tensor(total / count))
        of_none = self.ranks.sum((weight * gap).sum().double()).item()
        if self.config.loss == "balanced":
            weight, of_none = weight / max(of_none, 1e-12), 1.0
        return weight, of_none if of_none > 1e-12 else math.inf

    def check(self, batch: Batch, student: StudentLoss, norm: torch.Tensor, step: int) -> None:
        """`norm`: the gradient's, (). Raises `Diverged` where training can't succeed, and `TargetNotFinite`."""
        at = f"at iteration {step + 1}"
        check_target(batch.target, self.config.teacher, self.config.omega_max, f" {at}")
        for name, value in (("loss", student.loss), ("gradient", norm.item())):
            if not math.isfinite(value):
                raise Diverged(f"the {name} became {value} {at}", step)
        self._relative_losses = [*self._relative_losses, student.relative][-RECENT:]
        middle = statistics.median(self._relative_losses)
        if len(self._relative_losses) == RECENT and middle > _EXPLODED:
            raise Diverged(f"the loss exploded, {at} it is {middle:.0f} times that of no adapter", step)

    def optimise(self, state: RunState, learning_rate: float) -> None:
        for group in state.optimiser.param_groups:
            group["lr"] = learning_rate
        state.optimiser.step()

    def update_average(self, state: RunState) -> None:
        # Early on the average would be mostly the zero start; it may follow faster there.
        decay = min(self.config.ema, (1 + state.step) / (10 + state.step))
        for mean, live in zip(state.average.parameters(), state.adapter.parameters(), strict=True):
            mean.lerp_(live.detach(), 1 - decay)

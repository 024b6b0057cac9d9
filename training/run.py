"""All that changes while training, how it learns from a batch, and how it is saved and restored."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..agd_core.adapter import Adapter
from ..agd_core.adapter_file import AdapterInfo
from ..agd_core.config import AdapterConfig
from ..agd_core.errors import AGDError
from ..agd_core.guidance import balanced_weights, gaps, weighted_error
from ..agd_core.mixed_precision import MixedPrecision
from .config import TrainConfig
from .distributed import Ranks
from .evaluate import Evaluation
from .fitting import Teacher, as_fits
from .host import Host, Prompt
from .pool import Batch

_VERSION = 2
_LOSS_SCALE = 2.0**16  # as mixed precision training usually begins (Micikevicius et al. 2018)


class DifferentRun(AGDError, ValueError):
    """A saved state belongs to a run with other settings."""


@dataclass
class Best:
    """The best adapter that was measured: its mean gap closed, its step and its weights, on the CPU."""

    score: float
    step: int
    weights: dict[str, torch.Tensor]


@dataclass
class Run:
    """`micro_batch`: rows that the student evaluates at once, halved when out of memory. `loss_scale`: what the loss is
    multiplied by in the backward pass, for in fp16 small gradients are lost; halved when large ones overflow.

    `unconditional`: the negative prompt that stands in where a workflow has none; by default the first.

    `whole`: whether this is the state after an iteration, from which a run goes on unchanged.
    """

    host: Host
    config: TrainConfig
    adapter_config: AdapterConfig
    prompts: dict[str, Sequence[Prompt]]
    ranks: Ranks
    micro_batch: int
    teacher: Teacher
    unconditional: Prompt | None = None
    loss_scale: float = 1.0
    step: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)  # what was measured: step, gap_closed, direction_cosine
    evaluation: Evaluation | None = None
    best: Best | None = None
    whole: bool = False
    source: object = None  # TrajectoryPool or RecordedBatches

    def __post_init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            self.adapter = Adapter(self.adapter_config, MixedPrecision).to(self.host.device)
        if self.host.computes_in is torch.float16:
            self.loss_scale = _LOSS_SCALE
        if self.unconditional is None:
            self.unconditional = self.prompts["negative"][0]
        tokens = self.host.context(self.unconditional)
        self.adapter.unconditional.copy_(tokens[: self.adapter_config.prompt_tokens])  # of a long prompt its beginning
        self.average = copy.deepcopy(self.adapter).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(self.adapter.parameters(), lr=self.config.learning_rate, weight_decay=0.0)

    def start_from(self, info: AdapterInfo, state: dict[str, torch.Tensor], source: object) -> None:
        """Begin with the weights of another adapter. Raises `ValueError` where this one has no place for them."""
        own = self.adapter.state_dict()
        if info.config.kind.name == "scale" and self.adapter_config.kind.name == "delta":
            state = {key.replace("kind.", "kind.scale."): value for key, value in state.items()}
        state = {key: value for key, value in state.items() if key != "unconditional"}
        if not all(key in own and own[key].shape == value.shape for key, value in state.items()):
            raise ValueError(
                f"The adapter {source} ({info.config.kind.describe()}) can't be the start of one of kind "
                f"{self.adapter_config.kind.describe()}: train the same kind and width, or start a delta adapter from "
                "a scale adapter."
            )
        self.adapter.load_state_dict(own | state)
        self.average.load_state_dict(self.adapter.state_dict())

    def recent_loss(self) -> float:
        """The mean of the last 50 iterations', for a single one tells little."""
        recent = self.losses[-50:]
        return sum(recent) / max(1, len(recent))

    def update_average(self) -> None:
        # Early on the average would be mostly the zero start; it may follow faster there.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for mean, live in zip(self.average.parameters(), self.adapter.parameters(), strict=True):
            mean.lerp_(live.detach(), 1 - decay)

    def learn(self, batch: Batch) -> tuple[torch.Tensor, float, float]:
        """Gradients of the whole batch's loss, this rank's share of it evaluated here, in parts that fit.

        Returns the student's predictions (b, c, h, w) on the CPU, the loss, and the loss over that of no adapter.
        """
        while True:
            found = self._learn(batch)
            gradients = [p.grad for p in self.adapter.parameters() if p.grad is not None]
            for gradient in gradients if self.loss_scale != 1 else []:
                gradient.div_(self.loss_scale)
            if self.loss_scale == 1 or all(gradient.isfinite().all() for gradient in gradients):
                return found
            self.loss_scale /= 2  # too large for half precision, on all ranks alike: the gradients are the sum

    def _learn(self, batch: Batch) -> tuple[torch.Tensor, float, float]:
        weights, before = self._weights(batch)
        prompts = [self.prompts["positive"][i] for i in batch.positive.tolist()]
        negative = [self.prompts["negative"][i] for i in batch.negative.tolist()]

        def evaluate(rows: int) -> tuple[list[torch.Tensor], float]:
            self.optimiser.zero_grad(set_to_none=True)
            students, loss = [], 0.0
            for i in range(0, len(prompts), rows):
                own = (batch.x, batch.sigma, batch.omega, batch.target, weights, prompts, negative)
                x, sigma, omega, target, weight, c, c_neg = (v[i : i + rows] for v in own)
                student = self.host.student(self.adapter, x, sigma, c, c_neg, omega)
                part = weighted_error(student, target.to(student), sigma.to(student), weight.to(student))
                (part * self.loss_scale).backward()
                students.append(student.detach().cpu())
                loss += part.item()
            return students, loss

        (students, loss), self.micro_batch = as_fits(self.host, "the student", evaluate, self.micro_batch)
        loss = self.ranks.sum(torch.tensor(loss, dtype=torch.float64)).item()
        self.ranks.sum_gradients(self.adapter.parameters())
        return torch.cat(students), loss, loss / before

    def _weights(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Each row's weight in the loss (b,), and the loss of an adapter that does nothing.

        Infinite where the teacher guides none of the rows, so that no loss looks large beside it.
        """
        gap = gaps(batch.cond, batch.target, batch.sigma)
        total, count = self.ranks.sum(torch.tensor([gap.sum().item(), len(gap)], dtype=torch.float64)).tolist()
        if self.config.loss == "plain":
            weight = torch.full_like(gap, 1 / (count * batch.x[0].numel()))
        else:
            weight = balanced_weights(gap, torch.tensor(total / count))
        before = self.ranks.sum((weight * gap).sum().double()).item()
        if self.config.loss == "balanced":
            weight, before = weight / max(before, 1e-12), 1.0
        return weight, before if before > 1e-12 else math.inf

    def state(self, identity: dict) -> dict | None:
        """Everything that the run goes on from, the lanes of all ranks together; None on ranks that don't save."""
        common, lanes = self.source.state_dict()
        lanes = {name: self.ranks.gather(value) for name, value in lanes.items()}
        if not self.ranks.first:
            return None
        return {
            "version": _VERSION,
            "identity": identity,
            "step": self.step,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "losses": self.losses,
            "history": self.history,
            "best": vars(self.best) if self.best else None,
            "adapter": self.adapter.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "common": common,
            "lanes": lanes,
            "loss_scale": self.loss_scale,
        }

    def restore(self, state: dict) -> None:
        """Go on from a state that `check_same_run` has let through."""
        for name in ("step", "evaluations", "seconds", "losses", "history", "loss_scale"):
            setattr(self, name, state[name])
        self.best = Best(**state["best"]) if state["best"] else None
        self.adapter.load_state_dict(state["adapter"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        own = self.ranks.lanes(self.config.batch)
        lanes = {name: value[own.start : own.stop] for name, value in state["lanes"].items()}
        self.source.load_state_dict(state["common"], lanes)


def check_same_run(state: dict, identity: dict, where: object) -> None:
    """Raises `DifferentRun` if the state, which was found in `where`, is another run's."""
    saved = state.get("identity", {})
    if state.get("version") != _VERSION or saved != identity:
        raise DifferentRun(
            "A training of this name was begun with other settings: use those to go on with it, or delete its folder "
            f"to start anew. Details: {where} ({'; '.join(differences(saved, identity)) or 'of another version'})."
        )


def differences(then: dict, now: dict) -> list[str]:
    """What changed between two runs, a phrase each: "batch: 4 then, 8 now"."""

    def short(value) -> str:
        return f"{len(value)} lines" if isinstance(value, list) and len(json.dumps(value)) > 60 else f"{value!r:.60}"

    changed = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    phrases = []
    for key in changed:
        old, new = short(then.get(key)), short(now.get(key))
        phrases.append(f"{key}: {old} then, {new} now" if old != new else f"{key}: others now")
    return phrases

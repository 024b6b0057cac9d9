"""All that changes while training: one object, which is saved and restored as a whole."""

import copy
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..agd_core.adapter import Adapter
from ..agd_core.errors import AGDError
from ..agd_core.older_formats import rename_weights
from .config import TrainConfig
from .distributed import Ranks
from .gap import Measurement
from .older_settings import without_other_kinds
from .pool import BatchSource

_VERSION, _READABLE = 3, (2, 3)  # in version 2 weights have the names of adapter files of format 1


class DifferentRun(AGDError, ValueError):
    """A saved run state belongs to a run with other settings."""


@dataclass
class Best:
    """The best adapter that was measured: its mean gap closed, its step and its weights, on the CPU."""

    score: float
    step: int
    weights: dict[str, torch.Tensor]


@dataclass
class RunState:
    """`average`: the moving average of the adapter's weights, which is what is measured and saved as the adapter.

    `evaluations`: of the base, in rows. `loss_scale`: what the loss is multiplied by in the backward pass.
    `resumable`: whether this is the state after a complete iteration, from which the run goes on unchanged; not saved.
    """

    adapter: Adapter
    average: Adapter
    optimiser: torch.optim.Optimizer
    source: BatchSource
    loss_scale: float = 1.0
    step: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[Measurement] = field(default_factory=list)
    best: Best | None = None
    resumable: bool = False

    @classmethod
    def begin(cls, adapter: Adapter, source: BatchSource, learning_rate: float, loss_scale: float = 1.0) -> "RunState":
        average = copy.deepcopy(adapter).requires_grad_(False)
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=0.0)
        return cls(adapter, average, optimiser, source, loss_scale)

    @property
    def is_measured(self) -> bool:
        """Whether the adapter was measured after this step."""
        return bool(self.history) and self.history[-1].step == self.step

    def recent_loss(self) -> float:
        """The mean of the last 50 iterations', for a single one tells little."""
        recent = self.losses[-50:]
        return sum(recent) / max(1, len(recent))

    def state_dict(self, identity: dict, ranks: Ranks) -> dict[str, Any] | None:
        """What is saved, the rows of all ranks together; None on ranks that don't save. `identity`: the run's."""
        shared, per_row = self.source.state_dict()
        rows = {name: ranks.gather(value) for name, value in per_row.items()}
        if not ranks.first:
            return None
        return {
            "version": _VERSION,
            "identity": identity,
            "step": self.step,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "losses": self.losses,
            "history": [asdict(measured) for measured in self.history],
            "best": vars(self.best) if self.best else None,
            "adapter": self.adapter.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "common": shared,
            "lanes": rows,
            "loss_scale": self.loss_scale,
        }

    def load_state_dict(self, saved: dict[str, Any], rows: range) -> None:
        """Go on from what `check_same_run` has let through; `rows`: of the batch, those of this rank."""
        self.step, self.evaluations, self.seconds = saved["step"], saved["evaluations"], saved["seconds"]
        self.losses, self.loss_scale = saved["losses"], saved["loss_scale"]
        self.history = [Measurement(**measured) for measured in saved["history"]]
        if saved["best"]:
            self.best = Best(**{**saved["best"], "weights": rename_weights(saved["best"]["weights"])})
        self.adapter.load_state_dict(rename_weights(saved["adapter"]))
        self.average.load_state_dict(rename_weights(saved["average"]))
        self.optimiser.load_state_dict(saved["optimiser"])
        own = {name: value[rows.start : rows.stop] for name, value in saved["lanes"].items()}
        self.source.load_state_dict(saved["common"], own)


def check_same_run(saved: dict[str, Any], identity: dict, folder: object) -> None:
    """Raises `DifferentRun` if the run state that was saved in `folder` is another run's.

    Settings that there were none of then had what is the default now.
    """
    then = without_other_kinds(saved.get("identity", {}))
    if then:
        then = TrainConfig(kind=then.get("kind", TrainConfig.kind)).result_settings() | then
    if saved.get("version") not in _READABLE or then != identity:
        raise DifferentRun(
            "A training of this name was begun with other settings: use those to go on with it, or delete its folder "
            f"to start anew. Details: {folder} ({'; '.join(differences(then, identity)) or 'of another version'})."
        )


def differences(then: dict, now: dict) -> list[str]:
    """What changed between two runs, a phrase each: "batch: 4 then, 8 now"."""

    def short(value: Any) -> str:
        return f"{len(value)} lines" if isinstance(value, list) and len(json.dumps(value)) > 60 else f"{value!r:.60}"

    changed = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    phrases = []
    for key in changed:
        old, new = short(then.get(key)), short(now.get(key))
        phrases.append(f"{key}: {old} then, {new} now" if old != new else f"{key}: others now")
    return phrases

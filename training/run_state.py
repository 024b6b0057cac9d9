"""All that changes while training: one object, which is saved and restored as a whole."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..agd_core.adapter import Adapter
from ..agd_core.errors import AGDError
from ..agd_core.older_formats import rename_weights
from .distributed import Ranks
from .finite import non_finite
from .gap import Measurement
from .pool import BatchSource

_VERSION, READABLE = 3, (2, 3)  # in version 2 weights have the names of adapter files of format 1


_KEYS = {"identity", "step", "evaluations", "seconds", "losses", "history", "best", "adapter", "average", "optimiser"}
_KEYS |= {"common", "lanes", "loss_scale"}
_LISTED = 4  # offenders named in one error


class DamagedState(AGDError, ValueError):
    """What was saved is no state of this run."""


@dataclass
class Best:
    """The best adapter that was measured: its mean gap closed, its step and its weights, on the CPU."""

    score: float
    step: int
    weights: dict[str, torch.Tensor]


@dataclass
class RunState:
    """`average`: the moving average of the adapter's weights, which is what is measured and saved as the adapter.

    `by_sigma`: of the last measurement, `Evaluation.sigmas`; `shown`: the step of the last preview.
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
    by_sigma: dict[str, list[list[float]]] = field(default_factory=dict)
    shown: int = 0
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
            "by_sigma": self.by_sigma,
            "shown": self.shown,
            "best": vars(self.best) if self.best else None,
            "adapter": self.adapter.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "common": shared,
            "lanes": rows,
            "loss_scale": self.loss_scale,
        }

    def load_state_dict(self, saved: dict[str, Any], rows: range) -> None:
        """Go on from what `check_same_run` has let through; `rows`: of the batch, those of this rank.

        Raises `DamagedState`, and then this one is of no use any more.
        """
        try:
            own = {name: value[rows.start : rows.stop] for name, value in saved["lanes"].items()}
            saved = {"by_sigma": {}, "shown": saved["step"], **_renamed(saved), "lanes": own}
            wrong = [*_unlike(self._template(saved), saved, ""), *_no_tensors(own)]
            if wrong:
                raise ValueError(f"of another type or shape: {', '.join(wrong[:_LISTED])}")
            self._load(saved)
        # Whatever the values of somebody else's file make of torch.
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DamagedState(str(error).splitlines()[0] if str(error) else type(error).__name__) from error

    def _load(self, saved: dict[str, Any]) -> None:
        self.step, self.evaluations, self.seconds = saved["step"], saved["evaluations"], saved["seconds"]
        self.losses = saved["losses"]
        if (self.loss_scale == 1) == (saved["loss_scale"] == 1):  # else the run goes on in another precision
            self.loss_scale = saved["loss_scale"]
        self.history = [Measurement(**measured) for measured in saved["history"]]
        self.by_sigma, self.shown = saved["by_sigma"], saved["shown"]
        self.best = Best(**saved["best"]) if saved["best"] else None
        self.adapter.load_state_dict(saved["adapter"])
        self.average.load_state_dict(saved["average"])
        # Its settings are the same in every run, but for the learning rate, which each step sets.
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": saved["optimiser"]["state"]})
        self.source.load_state_dict(saved["common"], saved["lanes"])

    def _template(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Something like what should have been `saved`, for `_unlike`; earlier versions saved less."""
        weights, (shared, per_row) = self.adapter.state_dict(), self.source.state_dict()
        moments = [{"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p} for p in self.adapter.parameters()]
        return {
            "step": 0,
            "evaluations": 0,
            "seconds": 0.0,
            "loss_scale": 1.0,
            "losses": [0.0] * saved["step"],
            "history": [_like_measurement(measured) for measured in saved["history"]],
            "by_sigma": {name: [[0.0, 0.0]] * len(pairs) for name, pairs in saved["by_sigma"].items()},
            "shown": 0,
            "best": vars(Best(0.0, 0, weights)) if saved["history"] else None,
            "adapter": weights,
            "average": weights,
            "optimiser": {"state": {i: each for i, each in enumerate(moments) if i in saved["optimiser"]["state"]}},
            "common": {name: value for name, value in shared.items() if name in saved["common"]},
            "lanes": per_row,
        }


def _renamed(saved: dict[str, Any]) -> dict[str, Any]:
    """With the weights' names of today."""
    renamed = {name: rename_weights(saved[name]) for name in ("adapter", "average")}
    best = saved["best"] and {**saved["best"], "weights": rename_weights(saved["best"]["weights"])}
    return {**saved, **renamed, "best": best}


def _like_measurement(saved: dict[str, Any]) -> dict[str, Any]:
    by_omega = {name: dict.fromkeys(value, 0.0) for name, value in saved.items() if isinstance(value, dict)}
    return {name: value for name, value in asdict(Measurement(0, 0.0, **by_omega)).items() if name in saved}


def _unlike(expected: Any, found: Any, name: str) -> Iterator[str]:
    """The names of what has another type, shape or dtype, or isn't there."""
    if isinstance(expected, torch.Tensor):
        alike = isinstance(found, torch.Tensor) and found.dtype == expected.dtype
        if not alike or found.shape != expected.shape:
            yield name
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            yield from _unlike(value, found.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(expected, list) and isinstance(found, list):
        for i, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from _unlike(one, other, f"{name}.{i}")
    elif not isinstance(found, (int, float) if isinstance(expected, float) else type(expected)):
        yield name


def _no_tensors(values: dict[str, Any]) -> list[str]:
    return [name for name, value in values.items() if not isinstance(value, torch.Tensor)]


def check_saved(saved: Any) -> None:
    """Raises `ValueError` for what is no run state, or one that leads nowhere: it has a NaN.

    What depends on the run is left to `RunState.load_state_dict`.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("version"), int):
        raise ValueError("it is no state of a training")
    if saved["version"] not in READABLE:
        return  # `check_same_run` refuses it
    if missing := sorted(_KEYS - saved.keys()):
        raise ValueError(f"it has no {', '.join(missing)}")
    if not isinstance(saved["identity"], dict) or not isinstance(saved["step"], int):
        raise ValueError("it doesn't say of which training and step it is")
    if wrong := next(non_finite_parts(saved), None):
        raise ValueError(f"{wrong} holds NaN or infinity")


def non_finite_parts(saved: dict[str, Any]) -> Iterator[str]:
    """The names of what holds NaN or infinity; in measurements that says that there was nothing to measure."""
    for name, value in saved.items():
        if name != "history":
            yield from non_finite(value, name)

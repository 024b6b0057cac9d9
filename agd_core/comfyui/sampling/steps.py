"""What guidance needs of a sampling, whichever way it is given: the part that it is for, a step's cfg, what is said."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import torch
from comfy.samplers import CFGGuider

log = logging.getLogger(__name__)


def say_in_log(message: str) -> None:
    log.warning("AGD: %s", message)


def once(notify: Callable[[str], None]) -> Callable[[str], None]:
    """`notify`, for messages that it has not been given yet."""
    said = set()

    def say(message: str) -> None:
        if message not in said:
            said.add(message)
            notify(message)

    return say


class BeginAgain(BaseException):
    """A sampling is to begin again in another way, as its OUTER_SAMPLE wrapper decides.

    No `Exception`, for other nodes catch those around an evaluation and would go on with what it left.
    """


class Itself:
    """What belongs to one sampling or one MODEL, and so stays itself where a node makes a deep copy of its options."""

    def __deepcopy__(self, memo):
        return self


@dataclass(frozen=True)
class Span:
    """A part of the noise levels. The end is not part of it, so that of two that meet there one takes the step."""

    sigma_start: float
    sigma_end: float

    @classmethod
    def between(cls, model_sampling, start_percent: float, end_percent: float) -> "Span":
        """From 0, pure noise, to 1, in ComfyUI's percent of a model's schedule."""
        return cls(
            math.inf if start_percent <= 0 else float(model_sampling.percent_to_sigma(start_percent)),
            0.0 if end_percent >= 1 else float(model_sampling.percent_to_sigma(end_percent)),
        )

    @property
    def everywhere(self) -> bool:
        """Whether it is all of a sampling."""
        return self.sigma_start == math.inf and self.sigma_end == 0.0

    def covers(self, timestep: torch.Tensor) -> bool:
        if self.everywhere:
            return True  # the usual case, without reading a value back from the device
        return self.sigma_end < float(timestep.flatten()[0]) <= self.sigma_start


def copied(conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """A guider's conditions, for a sampling that may begin again: ComfyUI changes them where they are."""
    return {kind: [cond.copy() for cond in own] for kind, own in conds.items()}


def as_scale(cfg) -> float | None:
    """A guider's cfg, if it is one number. Those of some packs hold a list, a number for each step."""
    if isinstance(cfg, torch.Tensor) and cfg.numel() == 1:
        cfg = cfg.item()
    return float(cfg) if isinstance(cfg, Real) and math.isfinite(cfg) else None


@contextmanager
def with_cfg(guider: CFGGuider, cfg: float) -> Iterator[None]:
    saved, guider.cfg = guider.cfg, cfg
    try:
        yield
    finally:
        guider.cfg = saved


@dataclass
class CfgOverride(Itself):
    """PREDICT_NOISE wrapper: the cfg that a node of ours asks for, in the steps that it is for.

    `wanted(cfg, timestep)` gives it. A guider whose cfg is not one number keeps it: what it does with one is not known.
    `applied`: whether it is in force, for a guider may go around these wrappers.
    """

    wanted: Callable[[float, torch.Tensor], float]
    applied: bool = False

    def __call__(self, executor, x, timestep, model_options={}, seed=None):
        guider = executor.class_obj
        cfg = as_scale(guider.cfg)
        if cfg is None:
            return executor(x, timestep, model_options, seed)
        self.applied = True
        try:
            with with_cfg(guider, self.wanted(cfg, timestep)):
                return executor(x, timestep, model_options, seed)
        finally:
            self.applied = False


def name_of_guider(guider: CFGGuider) -> str:
    """Who evaluates in a sampling, for a message: a guider of its own kind, or whatever else has taken its place."""
    own = type(guider).predict_noise is not CFGGuider.predict_noise or type(guider).__call__ is not CFGGuider.__call__
    return f"the guider {type(guider).__name__}" if own else "another node"

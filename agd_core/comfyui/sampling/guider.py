"""ComfyUI's guiders, and those of other packs: their cfg, their names."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from comfy.samplers import CFGGuider

from .shared_by_deepcopy import SharedByDeepcopy


def as_scale(cfg: Any) -> float | None:
    """A guider's cfg, if it is one number. Those of some packs hold a list, a number for each step."""
    if isinstance(cfg, torch.Tensor) and cfg.numel() == 1:
        cfg = cfg.item()
    return float(cfg) if isinstance(cfg, Real) and math.isfinite(cfg) else None


@contextmanager
def with_cfg(guider: CFGGuider, cfg: float) -> Iterator[None]:
    """Inside, the guider has another cfg."""
    saved, guider.cfg = guider.cfg, cfg
    try:
        yield
    finally:
        guider.cfg = saved


@dataclass
class OverriddenCfg:
    """What a `CfgOverride` has done.

    `replaced`: the guider's own cfg while another is in force; None where none is, for a guider may go around these
    wrappers. `changed`: whether a step has had another cfg than the guider's own.
    """

    replaced: float | None = None
    changed: bool = False


@dataclass
class CfgOverride(SharedByDeepcopy):
    """PREDICT_NOISE wrapper: each step has the cfg that `cfg_of_step(cfg, timestep)` returns.

    A guider whose cfg is not one number keeps it: what it does with one is not known.
    """

    cfg_of_step: Callable[[float, torch.Tensor], float]
    done: OverriddenCfg

    def __call__(self, executor, x, timestep, model_options={}, seed=None):
        guider = executor.class_obj
        cfg = as_scale(guider.cfg)
        if cfg is None:
            return executor(x, timestep, model_options, seed)
        own, self.done.replaced = self.cfg_of_step(cfg, timestep), cfg
        self.done.changed = self.done.changed or own != cfg
        try:
            with with_cfg(guider, own):
                return executor(x, timestep, model_options, seed)
        finally:
            self.done.replaced = None


def name_of_guider(guider: CFGGuider) -> str:
    """Who evaluates in a sampling, for a message: a guider of its own kind, or whatever else has taken its place."""
    own = type(guider).predict_noise is not CFGGuider.predict_noise or type(guider).__call__ is not CFGGuider.__call__
    return f"the guider {type(guider).__name__}" if own else "another node"

"""What other nodes evaluate in a sampling, beside the pair of predictions that ComfyUI asks for in each step."""

from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from comfy.samplers import CFGGuider, Sampler

from . import messages
from .guider import OverriddenCfg, name_of_guider
from .post_cfg_watch import post_cfg_functions
from .restarts import PendingRestart, RestartUnguided
from .uncond_consumers import node_names


@dataclass
class OtherEvaluations:
    """Keeps the base's own predictions from being combined with guided ones, which would be neither CFG nor guided:
    once one is asked for no step is guided, and a sampling that has guided already, or has had an adapter's cfg, starts
    again unguided.

    `restart`, `overridden`: the sampling's; `guided`: whether a step was guided; `base_only`: whether none is to be
    from now on; `count`: other nodes' evaluations since one of their post-CFG functions returned.
    """

    guider: CFGGuider
    sampler: Sampler
    restart: PendingRestart
    overridden: OverriddenCfg
    guided: bool = False
    base_only: bool = False
    count: int = 0

    def request_base(self, model_options: dict) -> None:
        """Another node asks for the base's own prediction. Raises `RestartUnguided` where there was guidance."""
        if self._has_guidance():
            functions = post_cfg_functions(model_options)
            name = node_names(functions, self.sampler) or name_of_guider(self.guider)
            self.restart_unguided(messages.needs_both(name))
        self.base_only = True

    def combined_otherwise(self) -> None:
        """A pair of predictions wasn't combined by ComfyUI. Raises `RestartUnguided` where there was guidance."""
        self.base_only = True
        if self._has_guidance():
            self.restart_unguided(messages.combines_otherwise(name_of_guider(self.guider)))

    def _has_guidance(self) -> bool:
        """Whether the sampling so far is not what it would have been without adapters."""
        return self.guided or self.overridden.changed

    def restart_unguided(self, reason: str) -> NoReturn:
        self.restart.request(partial(RestartUnguided, reason))

    def take_count(self) -> int:
        """Evaluations since the last call."""
        count, self.count = self.count, 0
        return count

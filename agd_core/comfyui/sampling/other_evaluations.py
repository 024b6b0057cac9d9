"""What other nodes evaluate in a sampling, beside the pair of predictions that ComfyUI asks for in each step."""

from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from comfy.samplers import CFGGuider, Sampler

from . import messages
from .guider import name_of_guider
from .post_cfg_watch import post_cfg_functions
from .restarts import PendingRestart, RestartUnguided
from .uncond_consumers import node_names


@dataclass
class OtherEvaluations:
    """Sees to it that the base's own predictions are never combined with guided ones, which would be neither CFG nor
    guided: either no step of a sampling is guided, or it starts again unguided.

    `restart`: the sampling's; `guided`: whether a prediction was guided; `of_base`: whether one of the base's own was
    asked for; `count`: evaluations since a post-CFG function has returned.
    """

    guider: CFGGuider
    sampler: Sampler
    restart: PendingRestart
    guided: bool = False
    of_base: bool = False
    count: int = 0

    def ask_base(self, model_options: dict) -> None:
        """The base's own prediction is asked for. Raises `RestartUnguided` after a guided one."""
        if self.guided:
            functions = post_cfg_functions(model_options)
            name = node_names(functions, self.sampler) or name_of_guider(self.guider)
            self.restart_unguided(messages.needs_both(name))
        self.of_base = True

    def combined_otherwise(self) -> None:
        """A pair of predictions wasn't combined by ComfyUI. Raises `RestartUnguided` where they were guided."""
        self.of_base = True
        if self.guided:
            self.restart_unguided(messages.combines_otherwise(name_of_guider(self.guider)))

    def restart_unguided(self, reason: str) -> NoReturn:
        self.restart.request(partial(RestartUnguided, reason))

    def take_count(self) -> int:
        """Evaluations since the last call."""
        count, self.count = self.count, 0
        return count

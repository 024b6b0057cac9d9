"""A call of ComfyUI's `calc_cond_batch`, through which every evaluation of a sampler goes, as one value."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.samplers
import torch

from .schedule import NoiseLevels


@dataclass(frozen=True, eq=False)
class CondBatch:
    """Lists of conditions to be evaluated on latents x (b, c, h, w) at a noise level.

    `conds`: None for a prediction that isn't asked for; `timestep`: sigma (b,); `model`: ComfyUI's BaseModel;
    `levels`: the sampling's; `executor`: what evaluates it.
    """

    executor: Callable[..., list[torch.Tensor]]
    model: Any
    conds: list[list[dict] | None]
    x: torch.Tensor
    timestep: torch.Tensor
    model_options: dict
    levels: NoiseLevels

    @classmethod
    def from_args(cls, args: dict, levels: NoiseLevels) -> "CondBatch":
        """From what ComfyUI gives to functions in the model options. All wrappers are around its evaluation."""
        model, options = args["model"], args["model_options"]
        return cls(_calc_cond_batch, model, args["conds"], args["input"], args["sigma"], options, levels)

    @property
    def sigma(self) -> float:
        return self.levels.at(self.timestep)

    def evaluate(self) -> list[torch.Tensor]:
        """A prediction (b, c, h, w) for each of `conds`."""
        return self.executor(self.model, self.conds, self.x, self.timestep, self.model_options)

    def of_prompt(self) -> "CondBatch":
        """The first of `conds` alone."""
        return replace(self, conds=self.conds[:1])

    def with_transformer_options(self, transformer_options: dict) -> "CondBatch":
        return replace(self, model_options={**self.model_options, "transformer_options": transformer_options})


def _calc_cond_batch(*args) -> list[torch.Tensor]:
    return comfy.samplers.calc_cond_batch(*args)  # looked up when called: other packs replace it

"""Low-rank changes in the base's weights, for the time of one sampling.

Where omega is the same in every step, the changes of an adapter without modulation are a LoRA of strength omega - 1.
ComfyUI merges it as it does any LoRA: counted, offloaded and undone with the model's other patches, seen by
torch.compile, and free in each step. That omega stays as it is, and that no evaluation is to be the base's own, can't
be known before: `GuidedSampling` restarts a sampling where it turns out otherwise.
"""

import math
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider, Sampler
from torch import nn

from ..guided_step import KEY
from .applied_adapter import AppliedAdapter
from .guider import as_scale
from .post_cfg_watch import post_cfg_functions
from .restarts import SamplingMode
from .uncond_consumers import node_name

# Merged into weights of fewer bits a small change would be lost in their rounding.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Evaluators = tuple[type | str, ...]


@dataclass(frozen=True)
class Involved:
    """What has a part in a sampling. `evaluators`: what evaluates: the guider's class, and the names of other nodes'
    post-CFG functions; `others`: the names of the sampler's function and of other nodes' wrappers."""

    evaluators: Evaluators
    others: tuple[str, ...]

    @classmethod
    def of(cls, guider: CFGGuider, sampler: Sampler) -> "Involved":
        functions = post_cfg_functions(guider.model_options)
        evaluators: Evaluators = (type(guider), *(node_name(function, sampler) for function in functions))
        others = (getattr(sampler, "sampler_function", sampler), *_wrappers_of_others(guider.model_options))
        return cls(evaluators, tuple(node_name(other, None) for other in others))


def _wrappers_of_others(model_options: dict) -> Iterator[Callable]:
    for of_kind in model_options["transformer_options"].get("wrappers", {}).values():
        for key, wrappers in of_kind.items():
            yield from () if key == KEY else wrappers


@dataclass
class MergingHistory:
    """Which samplings of a MODEL have low-rank changes in the weights, by what earlier ones have shown.

    `in_vain`: what was involved where omega has changed within a sampling, or the base's own weights were needed again;
    `guided`: what has asked for guided steps, and for nothing else. Its samplings have the changes from their
    beginning, others once they have asked for a guided step.
    """

    in_vain: set[Involved] = field(default_factory=set)
    guided: set[Evaluators] = field(default_factory=set)

    def first_mode(self, adapter: AppliedAdapter, guider: CFGGuider, involved: Involved) -> SamplingMode:
        """The mode of a sampling by the only adapter, which guides all of its steps."""
        omega = adapter.omega(as_scale(guider.cfg))
        if involved in self.in_vain or not adapter.lora or omega is None or math.isclose(omega, 1.0):
            return SamplingMode()
        if not can_merge(guider, adapter.lora):
            return SamplingMode()
        if involved.evaluators in self.guided:
            return SamplingMode(mergeable_omega=omega, merged_omega=omega)
        if len(involved.evaluators) > 1:  # what other nodes use is seen in one sampling with the base's own weights
            return SamplingMode()
        return SamplingMode(mergeable_omega=omega)


def can_merge(guider: CFGGuider, lora: dict[str, torch.Tensor]) -> bool:
    """Whether the guider's model can have the LoRA in its weights throughout a sampling."""
    model = guider.model_patcher
    hooked = any(cond.get("hooks") is not None for conds in guider.conds.values() for cond in conds)
    on_several = bool(model.additional_models.get("multigpu"))  # each with weights of its own
    return not hooked and not on_several and all(_is_plain(weight) for weight in _changed(model, lora))


def _changed(model: ModelPatcher, lora: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The weights of the model that the LoRA is for."""
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    for key, patches in patched.patches.items():
        if len(patches) > len(model.patches.get(key, ())):
            yield comfy.utils.get_attr(model.model, key)


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight is what it seems: packed and quantised ones are tensors of classes of their own, of which the
    dtype may be the one that they are computed in."""
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in _DTYPES


@contextmanager
def merged_into(guider: CFGGuider, adapter: AppliedAdapter, omega: float) -> Iterator[None]:
    """Inside, the guider samples a clone of its model that has the adapter's low-rank changes for that omega."""
    saved, strength = guider.model_patcher, adapter.settings.strength * (omega - 1)
    clone, _ = comfy.sd.load_lora_for_models(saved, None, adapter.lora, strength, 0.0)
    # ComfyUI patches the weights again when this differs: named by what it is, it is the same in the next sampling.
    clone.patches_uuid = uuid.uuid5(saved.patches_uuid, f"{adapter.identity} {strength}")
    guider.model_patcher = clone
    try:
        yield
    finally:
        guider.model_patcher = saved

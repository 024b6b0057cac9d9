"""Low-rank changes in the base's weights, for the time of one sampling.

Where omega is the same in every step, the changes of an adapter without modulation are a LoRA of strength omega - 1.
ComfyUI merges it as it does any LoRA: counted, offloaded and undone with the model's other patches, seen by
torch.compile, and free in each step. That omega stays as it is, and that no evaluation is to be the base's own, can't
be known before: `Sampling` and `apply_model` watch it.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import nn

# Merged into weights of fewer bits a small change would be lost in their rounding.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_merge(guider, lora: dict[str, torch.Tensor]) -> bool:
    """Whether the guider's model can have the LoRA in its weights throughout a sampling."""
    model = guider.model_patcher
    hooked = any(cond.get("hooks") is not None for conds in guider.conds.values() for cond in conds)
    on_several = bool(model.additional_models.get("multigpu"))  # each with weights of its own
    return not hooked and not on_several and all(_is_plain(weight) for weight in _changed(model, lora))


def _changed(model: comfy.model_patcher.ModelPatcher, lora: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
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
def merged_into(guider, lora: dict[str, torch.Tensor], strength: float, identity: uuid.UUID) -> Iterator[None]:
    """Inside, the guider samples a clone of its model with the LoRA; `identity` is the LoRA's."""
    saved = guider.model_patcher
    clone, _ = comfy.sd.load_lora_for_models(saved, None, lora, strength, 0.0)
    # ComfyUI patches the weights again when this differs: named by what it is, it is the same in the next sampling.
    clone.patches_uuid = uuid.uuid5(saved.patches_uuid, f"{identity} {strength}")
    guider.model_patcher = clone
    try:
        yield
    finally:
        guider.model_patcher = saved

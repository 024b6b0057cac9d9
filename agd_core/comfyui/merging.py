"""Low-rank changes in the base's weights, for the time of one sampling.

Where omega is the same in every step, the changes of an adapter without modulation are a LoRA of strength omega - 1.
ComfyUI merges it as it does any LoRA: counted, offloaded and undone with the model's other patches, seen by
torch.compile, and free in each step. That omega stays as it is can't be known before: `EmbeddedGuidance` watches it.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.sd
import torch

# Merged into weights of fewer bits a small change would be lost in their rounding.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NotAsMerged(Exception):
    """A step is to have another guidance than the weights have."""


def can_merge(guider) -> bool:
    """Whether the guider's model can have a LoRA in its weights throughout a sampling."""
    hooked = any(cond.get("hooks") is not None for conds in guider.conds.values() for cond in conds)
    on_several = bool(guider.model_patcher.additional_models.get("multigpu"))  # each with weights of its own
    return guider.model_patcher.model_dtype() in _DTYPES and not hooked and not on_several


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

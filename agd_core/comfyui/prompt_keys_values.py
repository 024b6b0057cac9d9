"""What the base's attentions make of prompts, before an evaluation that is guided by it."""

from typing import Any

import torch

from .backbones import backbone_of
from .guided_step import GuidedStep
from .prompt import Prompt


@torch.no_grad()
def compute_keys_values(prompt: Prompt, model: Any, x: torch.Tensor, step: GuidedStep) -> None:
    """By the base's layers, with the weights that they have now, for latents like x (b, c, h, w).

    `model`: ComfyUI's BaseModel; `step`: the adapters at work. Nothing where none of them works inside attentions.
    """
    if step.guides_attention:
        prompt.keys_values.update(backbone_of(model).keys_values(model, prompt.arguments, x, step))


def depend_on_linears(model: Any) -> bool:
    """Whether the prompts of this `BaseModel` go through the blocks, so that changes of their layers change them too.

    Then those of the positive prompts are kept as well, for both to be of the same kind.
    """
    return backbone_of(model).prompts_pass_blocks

"""A ComfyUI CLIP as the trainer sees it."""

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import torch

from ...atomic import bytes_of
from ..backbones import backbone_of, describe_base


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """What the text encoder made of a prompt, on the CPU; `kind` is "positive" or "negative", `text` the prompt.

    Equal to itself alone.
    """

    cond: dict
    kind: str
    text: str = ""


def _kept(value: Any, dtype: torch.dtype) -> Any:
    """A part of a condition as it waits in system memory, with thousands of others: in the `dtype` that the model will
    cast it to.
    """
    if not isinstance(value, torch.Tensor):
        return value
    kept = value.to("cpu", dtype if value.is_floating_point() else None)
    # A part of a larger tensor would keep all of that one.
    return kept.clone() if kept.untyped_storage().nbytes() > kept.nbytes else kept


class ComfyTextEncoder:
    """Implements `training.model.TextEncoder`."""

    def __init__(self, clip: Any, model: comfy.model_patcher.ModelPatcher):
        """`clip`: None, as ComfyUI loads a checkpoint without one, raises `ValueError` at the first prompt. `model`:
        the base that the prompts are for.
        """
        self._clip, self._model, self._released = clip, model, False

    @property
    def patches(self) -> dict[str, Any]:
        """LoRAs on the text encoder, as ComfyUI's patcher has them."""
        return getattr(getattr(self._clip, "patcher", None), "patches", {})

    def encode(self, prompts: Sequence[str], kind: str = "positive") -> list[EncodedPrompt]:
        """Prompts for pictures of any size; `kind` is "positive" or "negative"."""
        dtype, encoded = self._model.model.get_dtype_inference(), []
        with torch.inference_mode(False), torch.no_grad():
            for prompt in prompts:
                tokens = self._tokens(prompt)
                conds = self._clip.encode_from_tokens_scheduled(tokens)
                cond = comfy.sampler_helpers.convert_cond(conds)[0]
                cond = backbone_of(self._model.model).condition_of(self._model.model, cond)
                self._check_width(cond["cross_attn"])
                encoded.append(EncodedPrompt({key: _kept(value, dtype) for key, value in cond.items()}, kind, prompt))
        return encoded

    def bytes_of(self, prompt: EncodedPrompt) -> int:
        """What it takes of system memory."""
        return bytes_of(prompt.cond)

    def length(self, prompt: str) -> int:
        """The tokens of a prompt, padding included, of all text encoders together: a longer one is encoded longer."""
        return sum(len(chunk) for chunks in self._tokens(prompt).values() for chunk in chunks)

    def _tokens(self, prompt: str) -> dict[str, list]:
        """By text encoder, chunks of tokens."""
        if self._released:
            raise ValueError("This model has released its text encoder; make another one for another run.")
        if self._clip is None:
            raise ValueError(
                "This checkpoint has no text encoder: load the model's own with CLIPLoader or DualCLIPLoader, and "
                "connect that to clip."
            )
        return self._clip.tokenize(prompt)

    @functools.cached_property
    def _width(self) -> int | None:
        """What the base takes, in channels of the prompt's tokens; None where only its structure tells."""
        layers = describe_base(self._model.model).layers
        return layers[0].context_dim if layers and backbone_of(self._model.model).family else None

    def _check_width(self, tokens: torch.Tensor) -> None:
        """Of a prompt (1, m, d). Raises `ValueError`."""
        if self._width not in (None, tokens.shape[-1]):
            raise ValueError(
                f"This text encoder makes prompts of {tokens.shape[-1]} channels, and the model takes {self._width}: "
                "choose the text encoder of the model, with the type that its workflows have."
            )

    def release(self) -> None:
        """No prompts will be encoded any more: the text encoder leaves the device, and memory if it is ours alone."""
        self._clip, self._released = None, True
        gc.collect()
        device = self._model.load_device
        if device.type != "cpu":
            comfy.model_management.free_memory(1e30, device)
            comfy.model_management.soft_empty_cache()

    def context(self, prompt: EncodedPrompt) -> torch.Tensor:
        """The prompt tokens (m, d) of a prompt that `encode` made."""
        return prompt.cond["cross_attn"][0]

"""A prompt as adapters know it: its condition, and what the base's attentions make of its tokens."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..layers import fit_rows


class KeysValues(NamedTuple):
    """Of a prompt's tokens at an adapter layer: (r, m, w), or (r, heads, m, w / heads), each.

    `mask`: (r, 1 or heads, 1, m), which of them the image may look at, as the base's attention takes it; `call`: of the
    block's attentions the one that they are for, counted from 0.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None = None
    call: int = 0

    def for_rows(self, rows: int) -> "KeysValues":
        keys, values = fit_rows(self.keys, rows), fit_rows(self.values, rows)
        return KeysValues(keys, values, None if self.mask is None else fit_rows(self.mask, rows), self.call)


@dataclass
class Prompt:
    """`arguments`: its condition, as arguments of `apply_model`, of one row or one for each latent; `keys_values`: by
    adapter layer, once they are needed; `means`: mean tokens by device, as well."""

    arguments: dict[str, Any]
    keys_values: dict[str, KeysValues] = field(default_factory=dict)
    means: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @property
    def context(self) -> torch.Tensor:
        """Its tokens (r, m, d)."""
        return self.arguments["c_crossattn"]

    def keys_values_at(self, name: str, rows: int) -> KeysValues:
        """For so many rows at an adapter layer."""
        return self.keys_values[name].for_rows(rows)

    def lacks(self, layers: list[str]) -> bool:
        """Whether the keys and values of one of those adapter layers are still to be computed."""
        return not self.keys_values.keys() >= set(layers)

    def mean_token(self, device: torch.device) -> torch.Tensor:
        """(r, d), fp32. Brought to the device once: what comes from the CPU waits for all that is queued there."""
        if device not in self.means:
            self.means[device] = mean_token(self.context, token_mask(self.arguments)).to(device)
        return self.means[device]


# What networks call the mask (r, m) of a prompt's tokens, Hunyuan-DiT by another name, and how many tokens count.
_MASKS, _COUNT = ("attention_mask", "text_embedding_mask"), "num_tokens"


def token_mask(arguments: dict[str, Any]) -> torch.Tensor | None:
    """(r, m), which of a prompt's tokens count, if its condition says so."""
    return next((arguments[key] for key in _MASKS if key in arguments), None)


def with_tokens(arguments: dict[str, Any], context: torch.Tensor) -> dict[str, Any]:
    """A prompt's arguments with other tokens (r, m, d), all of which count.

    Some networks don't run without being told so. A mask that is not of the tokens, such as Flux Redux's, is left out.
    """
    masks = {key: arguments[key] for key in _MASKS if key in arguments}
    tokens = arguments["c_crossattn"].shape[:2]
    ones = {key: mask.new_ones(context.shape[:2]) for key, mask in masks.items() if mask.shape == tokens}
    count = {_COUNT: context.shape[1]} if _COUNT in arguments else {}
    others = {key: value for key, value in arguments.items() if key not in masks}
    return {**others, **ones, **count, "c_crossattn": context}


def mean_token(context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Of a prompt (r, m, d), the mean (r, d), fp32, over the tokens that count by `mask` (r, m), if there is one."""
    return _masked(context, mask)[0]


def difference_of(context: torch.Tensor, mask: torch.Tensor | None, negative: torch.Tensor) -> torch.Tensor:
    """How the prompt (b, m, d) differs from the negative's mean token (b, d) -> (b, d), fp32.

    In units of what a token's channels are like, which is a different size for every text encoder.
    """
    mean, square = _masked(context, mask)
    return (mean - negative) / square.mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6)


def _masked(context: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The means (r, d) of the tokens and of their squares."""
    tokens = context.float()
    counts = torch.ones_like(tokens[..., :1])
    if mask is not None and mask.shape == tokens.shape[:2]:
        counts = (mask[..., None] > 0).to(tokens)
    total = counts.sum(dim=1).clamp(min=1)
    return (tokens * counts).sum(dim=1) / total, (tokens.square() * counts).sum(dim=1) / total

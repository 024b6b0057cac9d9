"""The authors' better adapter: one head of attention from the image to what is known of the guidance.

    Z  = [g, tt, pp] + pe[0 .. m+1]
    out = attn2(h) + Wo softmax((Wq h)(Wk Z)^T / sqrt(H)) (Wv Z) + bo
    pe[i] = [sin(i f_0 .. i f_{H/2-1}), cos(the same)]         f_j = 10000^(-2 j / H)

g, tt and pp as in paper.py. Shapes: as there, and n image tokens, w channels of a layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..checked import Between, Multiple
from ..config import MOST_CHANNELS, AdapterConfig
from ..errors import AGDError
from ..layers import Guidance, like, zero_init
from .paper import LinearPerLayer, PaperAdapter, PaperConfig

POSITIONS, _MAX_PERIOD = 250, 10_000


class PromptTooLong(AGDError, ValueError):
    """A prompt of more tokens than an adapter has positions for."""


@dataclass(frozen=True)
class PaperAttentionConfig(PaperConfig):
    name = "paper_attention"
    hidden: Annotated[int, Between(2, MOST_CHANNELS), Multiple(2)] = 320


def positions(width: int) -> torch.Tensor:
    """pe, (250, H)."""
    frequencies = _MAX_PERIOD ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(POSITIONS)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PaperAttentionAdapter(PaperAdapter):
    """A new one adds exactly nothing, as theirs without `zero_init`, a flag that their attention has the wrong way."""

    Config = PaperAttentionConfig

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__(config, operations)
        assert isinstance(config.kind, PaperAttentionConfig)
        H, layers = config.kind.hidden, config.layers
        self.prompt_tokens = config.prompt_tokens
        self.positions: torch.Tensor
        self.register_buffer("positions", positions(H))
        self.to_q = nn.ModuleDict({each.name: operations.Linear(each.width, H, bias=False) for each in layers})
        self.to_k = LinearPerLayer(self.layer_count, H, H, bias=False)
        self.to_v = LinearPerLayer(self.layer_count, H, H, bias=False)
        self.to_out = nn.ModuleDict({each.name: operations.Linear(H, each.width) for each in layers})

    def init_weights(self) -> None:
        super().init_weights()
        for to_q in self.to_q.values():
            nn.init.xavier_uniform_(to_q.get_parameter("weight"))
        self.to_k.init_xavier()
        self.to_v.init_xavier()
        zero_init(self.to_out)

    def zero_initialised(self) -> Iterable[nn.Module]:
        return self.to_out.values()

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> torch.Tensor:
        """context (b, m, d) -> keys and values (S, 2, b, r (2 + m / r), H), of r chunks of a prompt."""
        Z, b = self._with_positions(self._tokens(guidance, context)), len(context)
        both = torch.stack([to(Z.flatten(1, 2)) for to in (self.to_k, self.to_v)])
        return rearrange(both, "p s (b k) h -> s p b k h", b=b)

    def _tokens(self, guidance: Guidance, context: torch.Tensor) -> torch.Tensor:
        """[g, tt, pp], (S, b r, 2 + m / r, H).

        A prompt of several of the text encoder's chunks is as many sequences, each with the tokens of omega and t.
        Theirs is cut to one chunk. ComfyUI also has short prompts several times, where they share a batch with a
        longer one: attention gives the same for those.
        """
        m = context.shape[1]
        r = max(1, m // self.prompt_tokens) if self.from_prompt is not None and m % self.prompt_tokens == 0 else 1
        of_row = [self.embed_omega(guidance), self.embed_time(guidance)]  # (S, b, H)
        parts = [each.repeat_interleave(r, dim=1)[:, :, None] for each in of_row if each is not None]
        if self.from_prompt is not None:
            of_prompt = self.from_prompt(context.to(guidance.dtype).flatten(0, 1))  # (S, b m, H)
            parts.append(rearrange(of_prompt, "s (c m) h -> s c m h", m=m // r))
        return torch.cat(parts, dim=2)

    def _with_positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """(S, b r, k, H) -> the same. Raises `PromptTooLong`."""
        count = tokens.shape[2]
        if count > POSITIONS:
            raise PromptTooLong(
                "This prompt is too long for the adapter, which is one of the paper's: shorten it, or bypass the node "
                f"that adds tokens to it. Details: with those of the guidance it has {count} tokens in a row, and the "
                f"adapter has {POSITIONS} positions."
            )
        return tokens + like(self.positions[:count], tokens)

    def after_attention(self, name: str, h: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """A layer's h (b, n, w), and its keys and values (2, b, k, H) -> (b, n, w)."""
        keys, values = shared[:, :, None]  # one head
        out = F.scaled_dot_product_attention(self.to_q[name](h)[:, None], keys, values)
        return self.to_out[name](out[:, 0])

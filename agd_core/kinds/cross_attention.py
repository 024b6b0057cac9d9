"""Ours after the paper's better adapter (arXiv 2503.07274); the authors' own is `paper_attention.py`.

Shapes: b rows, n image tokens, m prompt tokens, d their channels (`context_dim`), w channels of a layer, H `hidden`,
S layers, E encoders of (omega, t): 1, or S if every layer has its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from ..checked import Between, Multiple
from ..config import MOST_CHANNELS, AdapterConfig, EncodedKindConfig, InnerChannels
from ..layers import Guidance, zero_init
from .adapter_kind import AdapterKind

# Attention heads of an adapter; up to H = 512 each stays within the 128 channels of fused attention kernels.
HEADS = 4


@dataclass(frozen=True)
class AfterPaperConfig(EncodedKindConfig):
    """Of our two after the paper's. `hidden`: H. `shared_encoder`: one omega/t encoder for all layers; the paper has
    one each."""

    hidden: InnerChannels = 128
    shared_encoder: bool = True

    def encoders(self, layers: int) -> int:
        return 1 if self.shared_encoder else layers

    def describe(self) -> str:
        return f"{self.name}, hidden {self.hidden}"


@dataclass(frozen=True)
class CrossAttentionConfig(AfterPaperConfig):
    name = "cross_attention"
    hidden: Annotated[int, Between(HEADS, MOST_CHANNELS), Multiple(HEADS)] = 128


class CrossAttentionAdapter(AdapterKind):
    """Queries from `h`, keys and values from [omega token, t token, prompt tokens]; the output starts at zero.

    The keys and values of all layers come from one matrix, so that they cost one product per evaluation.
    """

    Config = CrossAttentionConfig
    changes_attention_output = True

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__(config, operations)
        assert isinstance(config.kind, CrossAttentionConfig)
        hidden, layers = config.kind.hidden, config.layers
        self.prompt_tokens = config.prompt_tokens
        self.to_kv = operations.Linear(config.context_dim, self.layer_count * 2 * hidden, bias=False)
        self.to_q = nn.ModuleDict({each.name: operations.Linear(each.width, hidden, bias=False) for each in layers})
        self.to_out = nn.ModuleDict({each.name: operations.Linear(hidden, each.width) for each in layers})

    @classmethod
    def token_width(cls, config: AdapterConfig) -> int:
        return config.context_dim  # they stand beside the prompt's tokens

    def init_weights(self) -> None:
        """A new adapter adds exactly nothing."""
        zero_init(self.to_out)

    def zero_initialised(self) -> Iterable[nn.Module]:
        return self.to_out.values()

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> torch.Tensor:
        """guidance with tokens (b, E, 2, d), context (b, m, d) -> keys and values (S, 2, b, heads, 2 r + m, H / heads).

        Where a prompt shares a batch with a longer one, ComfyUI pads it by repetition, which plain attention does
        not notice. The omega and t tokens are repeated as often (r), so this attention doesn't either.
        """
        given = guidance.encoded()
        E, r = given.shape[1], max(1, context.shape[1] // self.prompt_tokens)
        tokens = repeat(given, "b e k d -> b (r e k) d", r=r)
        kv = self.to_kv(torch.cat([tokens, context], dim=1))
        kv = rearrange(kv, "b n (s p h d) -> s p b h n d", s=self.layer_count, p=2, h=HEADS)
        if E == 1:
            return kv
        # Of the tokens each layer attends to its own only.
        of_tokens, of_prompt = kv.split([tokens.shape[1], context.shape[1]], dim=-2)
        own = torch.stack([g.unflatten(-2, (r, E, 2))[..., layer, :, :] for layer, g in enumerate(of_tokens)])
        return torch.cat([own.flatten(-3, -2), of_prompt], dim=-2)

    def after_attention(self, name: str, h: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """A layer's h (b, n, w) and its keys and values (2, b, heads, 2 r + m, H / heads) -> (b, n, w)."""
        q = rearrange(self.to_q[name](h), "b n (h d) -> b h n d", h=HEADS)
        out = F.scaled_dot_product_attention(q, shared[0], shared[1])
        return self.to_out[name](rearrange(out, "b h n d -> b n (h d)"))

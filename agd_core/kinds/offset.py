"""Ours after the paper's other adapter (arXiv 2503.07274); the authors' own is `paper_additive.py`.

Shapes as in cross_attention.py.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..config import AdapterConfig
from ..layers import Guidance, zero_init
from .adapter_kind import AdapterKind
from .cross_attention import AfterPaperConfig


class OffsetConfig(AfterPaperConfig):
    name = "offset"


class OffsetAdapter(AdapterKind):
    """One vector from (omega, t, pooled condition), added to every token. The pooled condition is the tokens' mean."""

    Config = OffsetConfig
    changes_attention_output = True

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__(config, operations)
        assert isinstance(config.kind, OffsetConfig)
        hidden, d = config.kind.hidden, config.context_dim
        # One layer over [omega token, t token, pooled condition], in two parts: the first may differ by layer.
        self.from_tokens = operations.Linear(2 * d, self.layer_count * hidden)
        self.from_pooled = operations.Linear(d, self.layer_count * hidden, bias=False)
        self.to_out = nn.ModuleDict({each.name: operations.Linear(hidden, each.width) for each in config.layers})

    @classmethod
    def token_width(cls, config: AdapterConfig) -> int:
        return config.context_dim  # as that of the pooled condition

    def init_weights(self) -> None:
        """A new adapter adds exactly nothing."""
        zero_init(self.to_out)

    def zero_initialised(self) -> Iterable[nn.Module]:
        return self.to_out.values()

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> torch.Tensor:
        """guidance with tokens (b, E, 2, d), context (b, m, d) -> hidden activations (S, b, 1, H)."""
        tokens = guidance.encoded()
        E = tokens.shape[1]
        hidden = rearrange(self.from_tokens(tokens.flatten(2)), "b e (s h) -> s b e h", s=self.layer_count)
        if E > 1:
            hidden = torch.stack([own[:, layer, None] for layer, own in enumerate(hidden)])
        pooled = self.from_pooled(context.mean(dim=1, keepdim=True))
        return F.silu(hidden + rearrange(pooled, "b n (s h) -> s b n h", s=self.layer_count))

    def after_attention(self, name: str, h: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """A layer's h (b, n, w) and its hidden activations (b, 1, H) -> (b, 1, w), the same for all tokens."""
        return self.to_out[name](shared)

"""The paper's other adapter (arXiv 2503.07274). Shapes as in cross_attention.py."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..config import AdapterConfig
from ..layers import Guidance, zero_init


class OffsetAdapter(nn.Module):
    """One vector from (omega, t, pooled condition), added to every token. The pooled condition is the tokens' mean."""

    place = "output"

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.count, d = len(config.sites), config.context_dim
        # One layer over [omega token, t token, pooled condition], in two parts: the first may differ from site to site.
        self.from_tokens = operations.Linear(2 * d, self.count * config.hidden)
        self.from_pooled = operations.Linear(d, self.count * config.hidden, bias=False)
        self.to_out = nn.ModuleDict({s.name: operations.Linear(config.hidden, s.width) for s in config.sites})

    def start(self) -> None:
        """A new adapter adds exactly nothing."""
        zero_init(self.to_out)

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> torch.Tensor:
        """guidance with tokens (b, E, 2, d), context (b, m, d) -> hidden activations (S, b, 1, H)."""
        E = guidance.tokens.shape[1]
        hidden = rearrange(self.from_tokens(guidance.tokens.flatten(2)), "b e (s h) -> s b e h", s=self.count)
        if E > 1:
            hidden = torch.stack([own[:, site, None] for site, own in enumerate(hidden)])
        pooled = self.from_pooled(context.mean(dim=1, keepdim=True))
        return F.silu(hidden + rearrange(pooled, "b n (s h) -> s b n h", s=self.count))

    def forward(self, name: str, h: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """A site's h (b, n, w) and its hidden activations (b, 1, H) -> (b, 1, w), the same for all tokens."""
        return self.to_out[name](hidden)

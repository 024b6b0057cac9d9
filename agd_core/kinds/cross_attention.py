"""The paper's better adapter (arXiv 2503.07274).

Shapes: b rows, n image tokens, m prompt tokens, d their channels (`context_dim`), w channels of a site, H `hidden`,
S sites, E encoders of (omega, t): 1, or S if every site has its own.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from ..config import AdapterConfig
from ..layers import Guidance, zero_init

# Attention heads of an adapter; up to H = 512 each stays within the 128 channels of fused attention kernels.
HEADS = 4


class CrossAttentionAdapter(nn.Module):
    """Queries from `h`, keys and values from [omega token, t token, prompt tokens]; the output starts at zero.

    The keys and values of all sites come from one matrix, so that they cost one product per evaluation.
    """

    place = "output"

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.count, self.prompt_tokens = len(config.sites), config.prompt_tokens
        self.to_kv = operations.Linear(config.context_dim, self.count * 2 * config.hidden, bias=False)
        self.to_q = nn.ModuleDict({s.name: operations.Linear(s.width, config.hidden, bias=False) for s in config.sites})
        self.to_out = nn.ModuleDict({s.name: operations.Linear(config.hidden, s.width) for s in config.sites})

    def start(self) -> None:
        """A new adapter adds exactly nothing."""
        zero_init(self.to_out)

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> torch.Tensor:
        """guidance with tokens (b, E, 2, d), context (b, m, d) -> keys and values (S, 2, b, heads, 2 r + m, H / heads).

        Where a prompt shares a batch with a longer one, ComfyUI pads it by repetition, which plain attention does
        not notice. The omega and t tokens are repeated as often (r), so this attention doesn't either.
        """
        E, r = guidance.tokens.shape[1], max(1, context.shape[1] // self.prompt_tokens)
        tokens = repeat(guidance.tokens, "b e k d -> b (r e k) d", r=r)
        kv = self.to_kv(torch.cat([tokens, context], dim=1))
        kv = rearrange(kv, "b n (s p h d) -> s p b h n d", s=self.count, p=2, h=HEADS)
        if E == 1:
            return kv
        # Of the tokens each site attends to its own only.
        guidance, prompt = kv.split([tokens.shape[1], context.shape[1]], dim=-2)
        own = torch.stack([g.unflatten(-2, (r, E, 2))[..., site, :, :] for site, g in enumerate(guidance)])
        return torch.cat([own.flatten(-3, -2), prompt], dim=-2)

    def forward(self, name: str, h: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """A site's h (b, n, w) and its keys and values (2, b, heads, 2 r + m, H / heads) -> (b, n, w)."""
        q = rearrange(self.to_q[name](h), "b n (h d) -> b h n d", h=HEADS)
        out = F.scaled_dot_product_attention(q, kv[0], kv[1])
        return self.to_out[name](rearrange(out, "b h n d -> b n (h d)"))

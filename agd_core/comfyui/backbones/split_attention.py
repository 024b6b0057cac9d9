"""Attention to some keys and then to others, joined to what one softmax over all of them gives.

    A(q, [k_1, k_2]) = (Z_1 A(q, k_1) + Z_2 A(q, k_2)) / (Z_1 + Z_2),    Z_i = sum exp(q k_i)

So the image's queries look at the image once, and at each prompt for as little as its few tokens cost. torch's fused
attentions compute log Z on the way, and give it back only to their own backward pass: hence the operators below.
"""

from typing import NamedTuple

import torch

_aten = torch.ops.aten


class Looked(NamedTuple):
    """`out`: (b, heads, n, d), what queries got from some keys; `log_sum`: (b, heads, n), fp32, their log Z."""

    out: torch.Tensor
    log_sum: torch.Tensor

    def narrow(self, queries: slice) -> "Looked":
        return Looked(self.out[:, :, queries], self.log_sum[:, :, queries])


def can_split(q: torch.Tensor, channels: int) -> bool:
    """Whether such queries can, with so many channels in each head. No gradients come through `log_sum`."""
    if torch.is_grad_enabled() and q.requires_grad:
        return False
    if q.device.type == "cuda":
        return q.dtype in (torch.float16, torch.bfloat16) and channels % 8 == 0 and channels <= 256
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16)


def look(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> Looked:
    """q (b, heads, n, d), k and v (b, heads, m, d), mask (b or 1, heads or 1, n or 1, m), bool or added to logits."""
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        mask = mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    if q.device.type == "cpu":
        return Looked(*_aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale))
    if mask is None:
        out, log_sum, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    else:
        out, log_sum, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)
    return Looked(out, log_sum[:, :, : q.shape[2]])  # which may be padded


def joined(first: Looked, second: Looked) -> torch.Tensor:
    """(b, heads, n, d), for the keys of both."""
    share = torch.sigmoid(second.log_sum - first.log_sum)[..., None].to(first.out.dtype)  # Z_2 / (Z_1 + Z_2)
    return torch.lerp(first.out, second.out, share)

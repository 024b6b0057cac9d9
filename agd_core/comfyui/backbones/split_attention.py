"""Attention to some keys and then to others, joined to what one softmax over all of them gives.

    A(q, [k_1, k_2]) = (Z_1 A(q, k_1) + Z_2 A(q, k_2)) / (Z_1 + Z_2),    Z_i = sum exp(q k_i)

So the image's queries look at the image once, and at each prompt for as little as its few tokens cost; in a backward
pass as well. torch's fused attentions compute log Z on the way, and give it back only to their own backward passes,
which take no gradient of it: hence what is below.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ...text import logger

_aten = torch.ops.aten
_log = logger(__name__)
# Channels of each head that a backward pass adds: fused attentions take multiples of so many.
_ADDED = 8
_MOST_CHANNELS = 192 - _ADDED  # more than 192 have a backward pass on a few GPUs only
# Of what a fused attention gives, to what a plain one does: twice what bf16 loses.
_TOLERANCE = 2e-2


class Looked(NamedTuple):
    """`out`: (b, heads, n, d), what queries got from some keys; `log_sum`: (b, heads, n), fp32, their log Z."""

    out: torch.Tensor
    log_sum: torch.Tensor

    def narrow(self, queries: slice) -> "Looked":
        return Looked(self.out[:, :, queries], self.log_sum[:, :, queries])


class _Fused(NamedTuple):
    """A fused attention. `forward` (q, k, v, mask, scale) -> (out, log Z, whatever else `backward` takes);
    `backward` (gradient of out, q, k, v, mask, out, log Z, the rest, scale) -> gradients of q, k and v."""

    forward: Callable[..., tuple]
    backward: Callable[..., tuple]


def _cpu_forward(q, k, v, mask, scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def _cpu_backward(gradient, q, k, v, mask, out, log_sum, rest, scale):
    own = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    return own(gradient, q, k, v, out, log_sum, 0.0, False, attn_mask=mask, scale=scale)


def _flash_forward(q, k, v, mask, scale):
    out, log_sum, *rest, _ = _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out, log_sum, *rest


def _flash_backward(gradient, q, k, v, mask, out, log_sum, rest, scale):
    own = _aten._scaled_dot_product_flash_attention_backward
    return own(gradient, q, k, v, out, log_sum, *rest[:4], 0.0, False, *rest[4:], scale=scale)


def _efficient_forward(q, k, v, mask, scale):
    return _aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, scale=scale)


def _efficient_backward(gradient, q, k, v, mask, out, log_sum, rest, scale):
    own = _aten._scaled_dot_product_efficient_attention_backward
    wanted = [True, True, True, False]
    return own(gradient, q, k, v, mask, out, log_sum, *rest, 0.0, wanted, False, scale=scale)[:3]


_CPU = _Fused(_cpu_forward, _cpu_backward)
_FLASH = _Fused(_flash_forward, _flash_backward)  # takes no mask
_EFFICIENT = _Fused(_efficient_forward, _efficient_backward)


def can_split(q: torch.Tensor, channels: int) -> bool:
    """Whether such queries can, with so many channels in each head."""
    if q.device.type == "cpu":
        return q.dtype in (torch.float32, torch.bfloat16)
    return q.device.type == "cuda" and _has(_EFFICIENT, q, channels)


def look(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> Looked:
    """q (b, heads, n, d), k and v (b, heads, m, d), mask (b or 1, heads or 1, n or 1, m), bool or added to logits."""
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        # Fused attentions of a GPU want each row of a mask where a multiple of 8 begins.
        mask = F.pad(mask.to(q.dtype), (0, -k.shape[2] % 8))[..., : k.shape[2]]
        mask = mask.expand(*q.shape[:3], k.shape[2])
    return _looked(_fused_for(q, mask), q, k, v, mask, scale)


def _fused_for(q: torch.Tensor, mask: torch.Tensor | None) -> _Fused:
    if q.device.type == "cpu":
        return _CPU
    return _FLASH if mask is None and _has(_FLASH, q, q.shape[3]) else _EFFICIENT


def _has(fused: _Fused, q: torch.Tensor, channels: int) -> bool:
    """Whether a GPU has that attention for such queries."""
    if torch.compiler.is_compiling():  # nothing can be tried inside a graph
        return q.dtype in (torch.float16, torch.bfloat16) and channels % 8 == 0 and channels <= _MOST_CHANNELS
    return _is_sound(fused, q.device, q.dtype, channels)


def _looked(fused: _Fused, q, k, v, mask, scale: float | None) -> Looked:
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v))
    out, log_sum, *_ = _Look.apply(fused, q, k, v, mask, scale) if learns else fused.forward(q, k, v, mask, scale)
    return Looked(out, log_sum[:, :, : q.shape[2]])  # which may be padded


class _Look(torch.autograd.Function):
    """A fused attention of which both results have a gradient.

    With P = softmax(q k), the gradient of a logit is P (g v - g out + gl), for the gradients g of out and gl of log Z.
    Fused backward passes know the first two terms. The third is another channel of v that is 1 for every key, where g
    has gl and out has 0.
    """

    @staticmethod
    def forward(ctx, fused: _Fused, q, k, v, mask, scale: float):
        out, log_sum, *ctx.rest = fused.forward(q, k, v, mask, scale)
        ctx.fused, ctx.scale = fused, scale
        ctx.save_for_backward(q, k, v, mask, out, log_sum)
        return out, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor, of_log_sum: torch.Tensor):
        q, k, v, mask, out, log_sum = ctx.saved_tensors
        channels, n = q.shape[3], q.shape[2]
        of_log_sum = of_log_sum[:, :, :n, None].to(of_out.dtype)
        q, k, out = (F.pad(each, (0, _ADDED)) for each in (q, k, out))
        gradient = torch.cat([of_out, F.pad(of_log_sum, (0, _ADDED - 1))], dim=3)
        values = torch.cat([v, F.pad(torch.ones_like(v[..., :1]), (0, _ADDED - 1))], dim=3)
        found = ctx.fused.backward(gradient, q, k, values, mask, out, log_sum, ctx.rest, ctx.scale)
        return None, *(each[..., :channels] for each in found), None, None


def joined(first: Looked, second: Looked) -> torch.Tensor:
    """(b, heads, n, d), for the keys of both."""
    share = torch.sigmoid(second.log_sum - first.log_sum)[..., None].to(first.out.dtype)  # Z_2 / (Z_1 + Z_2)
    return torch.lerp(first.out, second.out, share)


@functools.cache
def _is_sound(fused: _Fused, device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether a GPU has that attention, and its results and gradients are those of a plain one.

    Which GPU and which torch has which is not for us to know, and what it gives wrongly would not show in training.
    """
    if channels > _MOST_CHANNELS:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        drawn = [torch.randn(1, 2, n, channels, generator=generator) for n in (40, 72, 72, 40)]
        q, k, v, wanted = (each.to(device, dtype) for each in drawn)

        def results(attend: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
            own = [each.detach().to(dtype).requires_grad_() for each in (q, k, v)]
            out = attend(*own)
            return [out, *torch.autograd.grad(out, own, wanted.to(dtype))]

        def in_parts(q, k, v):
            scale = 1 / math.sqrt(channels)
            parts = (slice(0, 40), slice(40, 72))
            return joined(*(_looked(fused, q, k[:, :, own], v[:, :, own], None, scale) for own in parts))

        def plainly(q, k, v):
            return torch.softmax(q @ k.mT / math.sqrt(channels), dim=-1) @ v

        try:
            pairs = zip(results(in_parts, dtype), results(plainly, torch.float32), strict=True)
            sound = all((a.float() - b).norm() <= _TOLERANCE * b.norm() for a, b in pairs)
        except (RuntimeError, NotImplementedError) as error:
            _log.debug("%s with %s in %d channels: %s", device, dtype, channels, error)
            sound = False
    return sound

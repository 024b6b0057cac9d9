"""Attention to an image once and to each prompt apart, by the operators of CUDA."""

import pytest
import torch
import torch.nn.functional as F

from comfyui_agd.agd_core.comfyui.backbones.split_attention import (
    _EFFICIENT,
    _FLASH,
    _is_sound,
    can_split,
    joined,
    look,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def drawn(tokens: int, channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(2, 3, tokens, channels, device="cuda", dtype=dtype, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_both_parts_are_the_whole_and_so_are_their_gradients(dtype, channels, masked):
    q, k, v, towards = drawn(1003, channels, dtype)
    assert can_split(q, channels)
    hidden = torch.zeros(2, 1, 1, 1003, dtype=torch.bool, device="cuda")
    hidden[..., 990:] = masked
    mask = ~hidden if masked else None

    def in_parts(q, k, v):
        halves = (slice(0, 700), slice(700, None))
        masks = (None if mask is None else mask[..., keys] for keys in halves)
        return joined(*(look(q, k[:, :, keys], v[:, :, keys], own) for keys, own in zip(halves, masks, strict=True)))

    def whole(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def results(attend, dtype):
        own = [each.to(dtype).requires_grad_() for each in (q, k, v)]
        out = attend(*own)
        return [out, *torch.autograd.grad(out, own, towards.to(dtype))]

    for found, expected in zip(results(in_parts, dtype), results(whole, torch.float32), strict=True):
        assert (found.float() - expected).norm() < 2e-2 * expected.norm()


def test_the_faster_attention_is_used_in_half_precision_alone():
    device = torch.device("cuda", 0)
    assert _is_sound(_FLASH, device, torch.bfloat16, 64)
    assert not _is_sound(_FLASH, device, torch.float32, 64)
    assert _is_sound(_EFFICIENT, device, torch.float32, 64)

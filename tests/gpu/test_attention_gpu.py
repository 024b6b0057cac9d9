"""Attention to an image once and to each prompt apart, by the operators of CUDA."""

import pytest
import torch
import torch.nn.functional as F

from comfyui_agd.agd_core.comfyui.backbones.split_attention import can_split, joined, look

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def drawn(tokens: int, channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(2, 3, tokens, channels, device="cuda", dtype=dtype, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_both_parts_are_the_whole(dtype, channels, masked):
    q, k, v = drawn(1000, channels, dtype)
    assert can_split(q, channels)
    hidden = torch.zeros(2, 1, 1, 1000, dtype=torch.bool, device="cuda")
    hidden[..., 990:] = masked
    mask = ~hidden if masked else None
    parts = [look(q, k[:, :, keys], v[:, :, keys], None if mask is None else mask[..., keys]) for keys in _halves(700)]
    expected = F.scaled_dot_product_attention(*(each.float() for each in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(joined(*parts).float(), expected, atol=2e-2, rtol=2e-2)


def _halves(first: int) -> tuple[slice, slice]:
    return slice(0, first), slice(first, None)


def test_what_cuda_has_no_operator_for_is_not_split():
    q, *_ = drawn(10, 64, torch.float32)
    assert not can_split(q, 64)
    assert not can_split(q.half(), 60)

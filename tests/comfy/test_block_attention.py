"""What adapters do inside a transformer's attentions, on tensors: the same by every way to it."""

import pytest
import torch
import torch.nn.functional as F

from comfyui_agd.agd_core.comfyui.backbones.block_attention import (
    AttentionCall,
    KeepingAttention,
    Place,
    SplitLooks,
    WholeLooks,
    prompt_keys_values,
    token_grid,
)
from comfyui_agd.agd_core.comfyui.backbones.split_attention import _CPU, _EFFICIENT, _is_sound, joined, look
from comfyui_agd.agd_core.comfyui.prompt import KeysValues, Prompt, difference_of, mean_token

B, HEADS, D, IMAGE, M = 2, 3, 8, 10, 4
FIRST, OTHERS = slice(0, 5), slice(5, None)  # of nine keys


def attention(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **unused):
    """As ComfyUI's attention functions are called."""
    if not skip_reshape:
        q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def tokens(n: int, by_head: bool, seed: int) -> torch.Tensor:
    drawn = torch.randn(B, HEADS, n, D, generator=torch.Generator().manual_seed(seed))
    return drawn if by_head else drawn.transpose(1, 2).flatten(2)


def call_of(by_head: bool, keys: int = IMAGE + M, **kwargs) -> AttentionCall:
    q, (k, v) = tokens(IMAGE + M, by_head, 0), (tokens(keys, by_head, seed) for seed in (1, 2))
    return AttentionCall(attention, q, k, v, HEADS, (), {"skip_reshape": by_head, **kwargs})


def kept(by_head: bool, m: int = M, mask: torch.Tensor | None = None, seed: int = 3) -> KeysValues:
    return KeysValues(tokens(m, by_head, seed), tokens(m, by_head, seed + 1), mask)


def hidden_last(m: int) -> torch.Tensor:
    """A mask that hides a prompt's last token."""
    return torch.arange(m)[None, None, None].expand(B, 1, 1, m) < m - 1


def test_attention_to_some_keys_and_then_to_others_is_attention_to_all():
    q, k, v = (tokens(9, True, seed) for seed in range(3))
    found = joined(look(q, k[:, :, :5], v[:, :, :5]), look(q, k[:, :, 5:], v[:, :, 5:]))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_hides_keys_in_it_too(dtype):
    q, k, v = (tokens(9, True, seed) for seed in range(3))
    mask = hidden_last(9) if dtype == torch.bool else torch.zeros(B, 1, 1, 9).masked_fill(~hidden_last(9), -1e9)
    found = joined(look(q, k[:, :, :5], v[:, :, :5]), look(q, k[:, :, 5:], v[:, :, 5:], mask[..., 5:]))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1]))


@pytest.mark.parametrize("masked", [True, False])
def test_its_gradients_are_those_of_attention_to_all(masked):
    q, k, v = (tokens(9, True, seed).requires_grad_() for seed in range(3))
    mask = hidden_last(9) if masked else None
    parts = (look(q, k[:, :, own], v[:, :, own], mask[..., own] if masked else None) for own in (FIRST, OTHERS))
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    towards = tokens(9, True, 3)
    found = torch.autograd.grad(joined(*parts), (q, k, v), towards)
    torch.testing.assert_close(found, torch.autograd.grad(whole, (q, k, v), towards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_attention_is_used_where_its_gradients_are_those_of_a_plain_one(dtype):
    device = torch.device("cpu")
    assert _is_sound(_CPU, device, dtype, 64)
    assert not _is_sound(_CPU._replace(backward=_wrong_backward), device, dtype, 64)
    assert not _is_sound(_EFFICIENT, device, dtype, 64)  # a CPU has none
    assert not _is_sound(_CPU, device, dtype, 192)


def _wrong_backward(*args) -> tuple[torch.Tensor, ...]:
    return tuple(1.1 * each for each in _CPU.backward(*args))


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_looking_at_the_image_once_is_looking_at_all_each_time(by_head, last, masked):
    place, mask = Place(joint=True, last=last), None
    if masked:
        _, prompt = place.split(IMAGE + M, M)
        mask = torch.ones(B, 1, 1, IMAGE + M, dtype=torch.bool)
        mask[..., prompt.stop - 1] = False
    own, other = kept(by_head), kept(by_head, m=6, mask=hidden_last(6) if masked else None, seed=7)
    found = []
    for kind in (WholeLooks, SplitLooks):
        call = call_of(by_head, mask=mask)
        learnt = [each.requires_grad_() for each in (call.q, call.k, call.v)]
        looks = kind(call, place, own)
        results = [looks.attended, looks.at(other)]
        assert looks.queries == place.split(IMAGE + M, M)[0]
        found.append((results, torch.autograd.grad([each.square().sum() for each in results], learnt)))
    whole, split = found
    torch.testing.assert_close(split, whole)


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_the_prompts_own_keys_give_what_the_base_has(by_head, last):
    call, place = call_of(by_head), Place(joint=True, last=last)
    _, prompt = place.split(IMAGE + M, M)
    keys, values = (each.narrow(call.axis, prompt.start, M) for each in (call.k, call.v))
    looks = WholeLooks(call, place, KeysValues(keys, values))
    torch.testing.assert_close(looks.at(KeysValues(keys, values)), looks.attended[:, looks.queries])


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_of_a_blocks_joint_attentions_the_one_with_the_prompts_tokens_is_kept(by_head, last):
    """SD 3.5 medium has one of the image alone behind it."""
    place = Place(joint=True, last=last)
    keeping = KeepingAttention(None, place, lambda: M)
    q, k, v = (tokens(IMAGE + M, by_head, seed) for seed in range(3))
    keeping(attention, q, k, v, HEADS, skip_reshape=by_head)
    alone = (tokens(IMAGE, by_head, seed) for seed in range(3))
    keeping(attention, *alone, HEADS, skip_reshape=by_head)
    found = keeping.keys_values()
    _, prompt = place.split(IMAGE + M, M)
    axis = 2 if by_head else 1
    assert found.call == 0
    assert torch.equal(found.keys, k.narrow(axis, prompt.start, M))
    assert torch.equal(found.values, v.narrow(axis, prompt.start, M))


def test_of_cross_attentions_it_is_the_first_that_is_not_the_images_own():
    keeping, other = (KeepingAttention(None, Place(joint=False), lambda m=m: m) for m in (M, M + 1))
    for keys in (IMAGE, 7, M, M):  # itself, a picture's tokens, the prompt's; the sound's behind it
        q, k, v = tokens(IMAGE, False, 0), tokens(keys, False, 1), tokens(keys, False, 2)
        for each in (keeping, other):
            each(attention, q, k, v, HEADS)
    assert keeping.keys_values().call == 2
    assert other.keys_values() is None


def test_where_the_image_has_as_many_tokens_as_the_prompt_it_is_the_second():
    keeping = KeepingAttention(None, Place(joint=False), lambda: M)
    for seed in range(2):
        keeping(attention, *(tokens(M, False, seed) for _ in range(3)), HEADS)
    assert keeping.keys_values().call == 1


def test_prompts_of_several_conditions_are_repeated_to_one_length():
    prompts = []
    for m in (3, 2):
        own = KeysValues(torch.full((1, m, 4), float(m)), torch.full((1, m, 4), -float(m)))
        prompts.append(Prompt({}, {"block": own}))
    found = prompt_keys_values(prompts, "block", 4, axis=1)
    assert found.keys.shape == (4, 6, 4)
    assert found.keys[:, 0, 0].tolist() == [3, 3, 2, 2]
    assert torch.equal(found.values, -found.keys)


@pytest.mark.parametrize(
    ("tokens", "sizes", "grid"),
    [
        (16, (8, 8), (4, 4)),
        (20, (7, 9), (4, 5)),
        (32, (2, 8, 8), (2, 4, 4)),
        (64, (4, 8, 8), (4, 4, 4)),
        (64, (8, 8), None),  # a picture and three to edit
        (48, (2, 8, 8), None),  # a frame beside the video's
        (20, (8, 8), None),
        (16, (256,), None),  # packed
    ],
)
def test_image_tokens_lie_as_patches_do(tokens, sizes, grid):
    assert token_grid(tokens, torch.Size(sizes), patch=2) == grid


def test_image_tokens_that_are_filled_up_begin_with_the_pictures():
    assert token_grid(32, torch.Size((8, 8)), patch=2, multiple=32) == (4, 4)
    assert token_grid(64, torch.Size((8, 8)), patch=2, multiple=32) is None


def test_the_difference_of_prompts_is_in_units_of_their_own_channels():
    context = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    negative = torch.zeros(2, 8)
    small, large = (difference_of(scale * context, None, negative) for scale in (1e-2, 1e2))
    torch.testing.assert_close(small, large)
    assert not difference_of(context, None, mean_token(context, None)).any()


def test_hidden_tokens_are_no_part_of_the_mean():
    context, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(mean_token(context, mask)[0], context[0, :2].mean(0))
    torch.testing.assert_close(mean_token(context, mask)[1], context[1].mean(0))

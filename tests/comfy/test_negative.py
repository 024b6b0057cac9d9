"""Adapters that use the negative prompt: which one, how often it is encoded, beside which nodes. And guidance
that needs no training.
"""

from functools import partial

import nodes
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention

from comfyui_agd.agd_core.attention_guidance import NAME, attention_guidance
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.agd_core.comfyui.backbones.unet import UNet, place_of
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings
from comfyui_agd.tests.support.runtime import (
    CFG,
    STEPS,
    Prompts,
    TinyXL,
    custom_sampler,
    ksampler,
    latent,
    patched,
    random_prompts,
    rows_of,
    tiny,
)

close = partial(torch.testing.assert_close, atol=2e-4, rtol=2e-4)


@pytest.fixture(scope="module", params=["scale", "delta"])
def file(request, base, save_adapter):
    return save_adapter(base, kind=request.param) if request.param == "delta" else None


@pytest.fixture
def agd(base, file):
    """A clone of a model with an adapter: a trained one, or guidance without training."""

    def patch(model=base, **options):
        if file is not None:
            return patched(model, file, **options)
        adapter = attention_guidance(describe_base(model.model))
        return apply_adapter(model, *adapter, GuidanceSettings(**options), source=NAME)

    return patch


def away_from(prompts: Prompts, negative: list) -> Prompts:
    return Prompts(prompts.positive, negative)


def test_one_evaluation_per_step_that_uses_the_negative_prompt(agd, prompts):
    other = away_from(prompts, random_prompts(seed=9).positive)
    assert rows_of(agd(), ksampler, prompts) == [1] * STEPS
    assert not torch.equal(ksampler(agd(), prompts), ksampler(agd(), other))


def test_the_negative_prompt_equal_to_the_positive_guides_nowhere(base, prompts):
    model = apply_adapter(base, *attention_guidance(describe_base(base.model)), source=NAME)
    same = away_from(prompts, prompts.positive)
    close(ksampler(model, same), ksampler(base, prompts, cfg=1.0))


def test_a_model_with_y():
    base, prompts, at = tiny(TinyXL()), random_prompts(pooled=1280), latent(2, channels=4)
    model = apply_adapter(base, *attention_guidance(describe_base(base.model)), source=NAME)
    assert rows_of(model, ksampler, prompts, at=at) == [2] * STEPS
    assert not torch.equal(ksampler(model, prompts, at=at), ksampler(base, prompts, at=at, cfg=1.0))


def test_keys_and_values_of_the_negative_are_computed_once_per_sampling(agd, base, prompts):
    calls = {"to_k": 0, "to_v": 0}
    model = agd()
    attention = next(iter(UNet(base.model.diffusion_model).blocks().values())).attn2

    def count(name, *_):
        calls[name] += 1

    handles = [getattr(attention, name).register_forward_hook(partial(count, name)) for name in calls]
    try:
        ksampler(model, prompts)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == {"to_k": STEPS + 1, "to_v": STEPS + 1}  # each step's own, and once the negative's


@pytest.mark.parametrize("repeats", [2, 3])
def test_a_negative_of_another_length_needs_no_padding(agd, prompts, repeats):
    (cond, rest), *_ = prompts.negative
    longer = away_from(prompts, [[cond.repeat(1, repeats, 1), rest]])  # to attention the same
    close(ksampler(agd(), longer), ksampler(agd(), prompts))


def test_every_picture_of_a_batch_may_have_a_negative_of_its_own(agd, prompts):
    (first, rest), (second, _) = prompts.negative[0], random_prompts(seed=9).positive[0]
    noise = {"samples": torch.randn(1, 12, 8, 8, generator=torch.manual_seed(3)).repeat(2, 1, 1, 1)}
    both = away_from(prompts, [[torch.cat([first, second]), rest]])
    together = ksampler(agd(), both, at=noise, denoise=0.5)
    for row, context in enumerate((first, second)):
        alone = ksampler(agd(), away_from(prompts, [[context, rest]]), at=noise, denoise=0.5)
        close(together[row], alone[row])


def test_several_negatives_count_by_their_strength(agd, prompts):
    other = random_prompts(seed=9).positive

    def strong(cond: list, strength: float) -> list:
        return nodes.node_helpers.conditioning_set_values(cond, {"strength": strength})

    def run(*negatives: list) -> torch.Tensor:
        return ksampler(agd(), away_from(prompts, [cond for negative in negatives for cond in negative]))

    close(run(strong(prompts.negative, 1.0), strong(other, 1e-6)), run(prompts.negative))
    assert not torch.allclose(run(prompts.negative, other), run(prompts.negative))
    close(run(prompts.negative, prompts.negative), run(prompts.negative))


def test_a_negative_for_a_part_of_the_sampling_counts_in_that_part(agd, prompts):
    in_range = nodes.ConditioningSetTimestepRange().set_range
    other = random_prompts(seed=9).positive
    never = in_range(other, 0.999, 1.0)[0]
    close(ksampler(agd(), away_from(prompts, prompts.negative + never)), ksampler(agd(), prompts))
    halves = in_range(prompts.negative, 0.0, 0.5)[0] + in_range(other, 0.5, 1.0)[0]
    assert not torch.allclose(ksampler(agd(), away_from(prompts, halves)), ksampler(agd(), prompts))


def test_without_a_negative_a_trained_adapter_has_its_unconditional(base, prompts, save_adapter):
    file = save_adapter(base, kind="delta")
    model = patched(base, file, guidance_scale=CFG)
    (adapter,) = model.get_nested_additional_models()
    with torch.no_grad():
        adapter.model.unconditional.copy_(prompts.negative[0][0][0])
    close(custom_sampler(model, prompts, "BasicGuider"), custom_sampler(model, prompts, "CFGGuider"))
    zeroed = away_from(prompts, nodes.ConditioningZeroOut().zero_out(prompts.negative)[0])
    close(ksampler(model, zeroed), ksampler(model, prompts))


def test_without_a_negative_guidance_without_training_says_that_it_needs_one(base, prompts):
    messages = []
    adapter, settings = attention_guidance(describe_base(base.model)), GuidanceSettings(CFG)
    model = apply_adapter(base, *adapter, settings, source=NAME, notify=messages.append)
    assert torch.equal(custom_sampler(model, prompts, "BasicGuider"), custom_sampler(base, prompts, "BasicGuider"))
    assert len(messages) == 1
    assert "the workflow has no negative prompt" in messages[0]


class Replacement:
    """Another node's attention: the base's own, noting whose row it was asked for; `swapped` answers otherwise."""

    def __init__(self, factor: float = 1.0):
        self.factor, self.asked = factor, []

    def __call__(self, q, k, v, extra_options):
        self.asked.append(tuple(extra_options["cond_or_uncond"]))
        return self.factor * optimized_attention(q, k, v, extra_options["n_heads"])

    def on(self, model):
        model = model.clone()
        for name in UNet(model.model.diffusion_model).blocks():
            model.set_model_attn2_replace(self, *place_of(name))
        return model


@pytest.mark.parametrize("order", ["before", "after"])
def test_another_replacement_of_the_attention_is_asked_for_both_prompts(agd, base, prompts, order):
    plain = Replacement()
    model = agd(plain.on(base)) if order == "before" else plain.on(agd())
    close(ksampler(model, prompts), ksampler(agd(), prompts))
    assert set(plain.asked) == {(0,), (1,)}
    other = Replacement(0.5)
    changed = agd(other.on(base)) if order == "before" else other.on(agd())
    assert not torch.allclose(ksampler(changed, prompts), ksampler(agd(), prompts))


def test_nothing_stays_in_the_base(agd, base, prompts):
    before = ksampler(base, prompts)
    ksampler(agd(), prompts)
    assert torch.equal(ksampler(base, prompts), before)
    assert "attn2" not in base.model_options["transformer_options"].get("patches_replace", {})


def test_regions_use_the_negative_each_by_itself(agd, prompts):
    """A region's prediction is that of its prompt alone: what is cached of the negative fits any number of rows."""
    both = nodes.ConditioningCombine().combine(prompts.positive, random_prompts(seed=9).positive)[0]
    combined = ksampler(agd(), Prompts(both, prompts.negative), steps=1)
    parts = [ksampler(agd(), Prompts([cond], prompts.negative), steps=1) for cond in both]
    close(combined, sum(parts) / 2)

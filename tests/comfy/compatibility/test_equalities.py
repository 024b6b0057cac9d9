"""What makes a row of docs/compatibility.md right, beyond its costs: equalities that only the right picture keeps."""

import math
from functools import partial

import comfy.model_patcher
import nodes
import pytest
import torch

from comfyui_agd.tests.support import workflows as w
from comfyui_agd.tests.support.companions import ImagePrompt, control_net
from comfyui_agd.tests.support.runtime import (
    STEPS,
    Prompts,
    TwoWidths,
    in_dtype,
    ksampler,
    ksampler_advanced,
    latent,
    patched,
    since,
)
from comfyui_agd.tests.support.workflows import NODES, PROMPTS, no_agd

close = partial(torch.testing.assert_close, atol=2e-4, rtol=2e-4)


@pytest.fixture(params=["without", "with"])
def agd(request, file):
    """ComfyUI itself keeps these equalities without an adapter; with one they have to stay."""
    return no_agd if request.param == "without" else partial(patched, file=file)


@pytest.fixture
def model(base, file):
    return patched(base, file)


def predict(model, positive: list, at: dict | None = None) -> torch.Tensor:
    """One step from the highest noise level to 0, whose result is the prediction itself."""
    return ksampler(model, Prompts(positive, PROMPTS.negative), at=at, steps=1)


# Prompts. ComfyUI pads a prompt that shares a batch with a longer one by repeating it.


def test_combined_prompts_of_different_lengths_are_their_mean(agd, base):
    model = agd(base)
    both = nodes.ConditioningCombine().combine(PROMPTS.positive, w.LONG.positive)[0]
    close(predict(model, both), (predict(model, PROMPTS.positive) + predict(model, w.LONG.positive)) / 2)


def test_masked_prompts_are_each_in_its_region(agd, base):
    model = agd(base)
    left, right = predict(model, PROMPTS.positive), predict(model, w.LONG.positive)
    regional = predict(model, w.masked(PROMPTS.positive, w.LONG.positive))
    close(regional[..., :4], left[..., :4])
    close(regional[..., 4:], right[..., 4:])


def test_an_area_is_the_prediction_of_its_crop(model):
    regional = predict(model, w.areas_of(PROMPTS.positive, w.LONG.positive))
    noise = torch.randn(1, 12, 8, 8, generator=torch.manual_seed(7))
    for half, positive in enumerate((PROMPTS.positive, w.LONG.positive)):
        part = slice(4 * half, 4 * half + 4)
        alone = w.predict_from(model, Prompts(positive, PROMPTS.negative), noise[..., part])
        close(regional[..., part], alone)


def test_regions_batched_and_one_by_one_are_equal(agd, base, monkeypatch):
    together = [run(agd, base, "") for run in (w.combine, w.masks, w.areas)]
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
    for run, batched in zip((w.combine, w.masks, w.areas), together, strict=True):
        close(run(agd, base, ""), batched)


def test_a_prompt_concatenated_with_itself_is_that_prompt(agd, base):
    model = agd(base)
    twice = nodes.ConditioningConcat().concat(PROMPTS.positive, PROMPTS.positive)[0]
    close(predict(model, twice), predict(model, PROMPTS.positive))


def test_timestep_ranges_equal_a_split_with_a_prompt_for_each_part(agd, base):
    model = agd(base)
    first = ksampler_advanced(model, PROMPTS, latent(), 0, 2)
    second = Prompts(w.LONG.positive, PROMPTS.negative)
    close(w.timestep_ranges(agd, base), ksampler_advanced(model, second, first, 2)["samples"])


# What is sampled


def test_a_split_sampling_equals_the_whole(agd, base):
    close(w.split(agd, base), ksampler(agd(base), PROMPTS))


def test_a_picture_of_a_batch_equals_it_alone(agd, base):
    together = ksampler(agd(base), PROMPTS, at=w.noise(3), denoise=0.5)
    alone = ksampler(agd(base), PROMPTS, at=w.noise(1), denoise=0.5)
    close(together[:1], alone)  # the first draws the same noise in both


def test_a_model_keeps_nothing_of_the_sizes_it_has_sampled(agd, base):
    sampled = w.mixed_sizes(agd, base)
    first, last = sampled[: 12 * 64], sampled[-12 * 64 :]
    assert torch.equal(first, last)
    assert torch.equal(first, ksampler(agd(base), PROMPTS, steps=2).flatten())


def test_context_windows_over_a_batch_equal_the_batch(agd, base):
    close(w.context_windows(agd, base), ksampler(agd(base), PROMPTS, at=latent(6)))


def test_the_unmasked_part_of_an_inpainted_picture_is_kept(model, base):
    painted = w.inpainting(lambda _: model, base)
    close(painted[..., :3], w.noise()["samples"][..., :3])
    assert not torch.equal(painted[..., 3:], w.noise()["samples"][..., 3:])


# What works on the conditions


def test_hook_keyframes_equal_a_split_with_the_lora_in_the_second_part(agd, base):
    model = agd(base)
    first = ksampler_advanced(model, PROMPTS, latent(), 0, 2)
    hooked = ksampler(model, Prompts(w.hooked(PROMPTS.positive), w.hooked(PROMPTS.negative)))
    close(hooked, ksampler_advanced(w.load_lora(model), PROMPTS, first, 2)["samples"])
    assert not torch.equal(hooked, ksampler(model, PROMPTS))


def test_a_hook_on_the_negative_is_the_negatives_alone(model):
    one = ksampler(model, Prompts(PROMPTS.positive, w.hooked(PROMPTS.negative)))
    both = ksampler(model, Prompts(w.hooked(PROMPTS.positive), w.hooked(PROMPTS.negative)))
    assert not torch.equal(one, both)
    (adapter,) = model.get_nested_additional_models()
    assert torch.allclose(one, ksampler(model, PROMPTS), atol=1e-5) != adapter.model.uses_negative


def test_a_lora_hook_of_one_region_stays_in_it(agd, base):
    model = agd(base)
    hooks = w.nodes_hooks.CreateHookLoraModelOnly().create_hook_model_only(w.LORA, 1.0)[0]
    hooked = w.nodes_hooks.ConditioningSetProperties().set_properties(PROMPTS.positive, 1.0, "default", hooks=hooks)[0]
    regional, plain = predict(model, w.masked(hooked, PROMPTS.positive)), predict(model, PROMPTS.positive)
    close(regional[..., 4:], plain[..., 4:])
    assert (regional[..., :4] - plain[..., :4]).abs().min() > 0
    close(regional[..., :4], predict(model, hooked)[..., :4])


@pytest.mark.parametrize("workflow", ["boxes", "control", "two_controls", "control_on_positive"])
def test_what_is_on_the_conditions_is_seen(agd, base, workflow):
    assert not torch.equal(getattr(w, workflow)(agd, base), ksampler(agd(base), PROMPTS))


def test_a_second_controlnet_is_seen(agd, base):
    assert not torch.equal(w.two_controls(agd, base), w.control(agd, base))


def test_a_controlnet_of_strength_0_is_none(agd, base):
    close(ksampler(agd(base), w.controlled(control_net(), strength=0.0)), ksampler(agd(base), PROMPTS))


def test_a_controlnet_on_the_negative_makes_no_difference(model, base):
    both, positive = w.control(lambda _: model, base), w.control_on_positive(lambda _: model, base)
    assert torch.equal(both, positive)


def test_the_controlnet_itself_is_evaluated_half_as_often(base, model):
    rows = []
    for sampled in (base, model):
        net = control_net()
        net.control_model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(kwargs["x"].shape[0]), with_kwargs=True
        )
        ksampler(sampled, w.controlled(net))
    assert rows == [2] * STEPS + [1] * STEPS


# Nodes that change the model: that before and after the loader are equal is in test_row


@pytest.mark.parametrize("name", w.WORKS_BESIDE)
def test_the_other_node_is_seen_beside_the_adapter(model, name):
    def sample(model):
        return ksampler(model, PROMPTS, at=latent(1, 16, 16), steps=2)

    assert not torch.equal(sample(NODES[name](model)), sample(model))


@pytest.mark.parametrize("name", ["lora", "merging"])
def test_changed_weights_are_seen_beside_the_adapter(agd, base, name):
    steps = {"lora": 2, "merging": 1}[name]
    assert not torch.equal(getattr(w, name)(agd, base, "before"), ksampler(agd(base), PROMPTS, steps=steps))


def test_two_loras_around_the_loader_equal_two_before_it(base, file):
    around = w.load_lora(patched(w.load_lora(base), file), w.OTHER_LORA)
    before = patched(w.load_lora(w.load_lora(base), w.OTHER_LORA), file)
    assert torch.equal(ksampler(around, PROMPTS, steps=2), ksampler(before, PROMPTS, steps=2))


def test_the_second_model_of_a_merge_brings_no_adapter(base, file):
    merge = w.nodes_model_merging.ModelMergeSimple().merge
    merged, expected = (merge(w.other_model(), second, 0.6)[0] for second in (patched(base, file), base))
    assert torch.equal(ksampler(merged, PROMPTS, steps=1), ksampler(expected, PROMPTS, steps=1))


def test_an_attn2_replacement_is_asked_for_the_unconditional_by_kinds_that_use_the_negative(model):
    image, (adapter,) = ImagePrompt(), model.get_nested_additional_models()
    ksampler(image.install(model), PROMPTS)
    assert image.seen == ({0, 1} if adapter.model.uses_negative else {0})


def test_cfg_override_sets_omega_for_its_steps(base, model):
    since("0.26.0")
    first = ksampler_advanced(model, PROMPTS, latent(1, 16, 16), 0, 2, cfg=3.0)
    expected = ksampler_advanced(model, PROMPTS, first, 2)["samples"]
    close(ksampler(NODES["CFGOverride"](model), PROMPTS, at=latent(1, 16, 16)), expected)


def test_pag_adds_its_own_difference_in_proportion_to_its_scale(agd, base):
    node = w.nodes_pag.PerturbedAttentionGuidance
    zero, one, three = (predict(node.execute(agd(base), s).args[0], PROMPTS.positive) for s in (0.0, 1.0, 3.0))
    close(zero, predict(agd(base), PROMPTS.positive))
    close(three - zero, 3 * (one - zero), atol=1e-3)
    assert (one - zero).abs().max() > 0.1


# The loader itself


def test_two_loaders_at_half_strength_equal_one(base, file, model):
    close(w.two_loaders(partial(patched, file=file), base), ksampler(model, PROMPTS))


def test_two_loaders_hand_over(base, file, other):
    def agd_of(file):
        return lambda model, **options: patched(model, file, **options)

    first = agd_of(file)(base, end_percent=0.5)
    both = agd_of(other)(first, start_percent=0.5)
    half = ksampler_advanced(agd_of(file)(base), PROMPTS, latent(), 0, 2)
    close(ksampler(both, PROMPTS), ksampler_advanced(agd_of(other)(base), PROMPTS, half, 2)["samples"])


def test_two_loaders_in_either_order_are_equal(base, file, other):
    one = patched(patched(base, file, strength=0.3), other, strength=0.7)
    two = patched(patched(base, other, strength=0.7), file, strength=0.3)
    close(ksampler(one, PROMPTS), ksampler(two, PROMPTS))


@pytest.mark.parametrize("name", w.DTYPES)
def test_the_adapter_has_the_dtype_that_the_base_computes_in(base, file, name):
    stored, computed = w.DTYPES[name]
    lean = in_dtype(base, TwoWidths, stored, computed)
    assert lean.model_dtype() == stored
    model = patched(lean, file)
    (adapter,) = model.get_nested_additional_models()
    assert {tensor.dtype for tensor in adapter.model.parameters()} == {computed or stored}
    # Near the fp32 picture, as far as the base itself is.
    exact, guided = ksampler(base, PROMPTS, steps=1), ksampler(patched(base, file), PROMPTS, steps=1)
    own = (ksampler(lean, PROMPTS, steps=1) - exact).norm() / exact.norm()
    assert (ksampler(model, PROMPTS, steps=1) - guided).norm() / guided.norm() < 3 * own + 1e-6
    assert math.isfinite(own)

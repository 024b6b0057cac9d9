"""Guidance without training on any model. What it works with is in compatibility/test_table.py."""

import math

import comfy.supported_models
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from comfyui_agd.agd_core import alternating
from comfyui_agd.agd_core.attention_guidance import attention_guidance
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.schedule import percent_of_sigma
from comfyui_agd.examples.toy.sampling import encode
from comfyui_agd.tests.support.runtime import (
    CFG,
    STEPS,
    Prompts,
    ksampler,
    ksampler_advanced,
    latent,
    patched,
    random_prompts,
    rows_of,
    tiny,
    training_free,
)

MANY = 12  # steps that are near enough to each other


@pytest.fixture(autouse=True)
def agreeing(monkeypatch):
    """What models of random weights say at neighbouring steps need not agree."""
    monkeypatch.setattr(alternating, "AGREES", -math.inf)


def test_one_evaluation_per_step(base, prompts):
    assert rows_of(training_free(base), ksampler, prompts, steps=MANY) == [1] * MANY
    assert rows_of(training_free(base), ksampler, prompts, steps=MANY, at=latent(3)) == [3] * MANY


def test_few_steps_are_cfgs_own_but_for_the_first_which_has_no_guidance(base, prompts):
    messages = []
    model = training_free(base, notify=messages.append)
    assert rows_of(model, ksampler, prompts) == [1] + [2] * (STEPS - 1)
    assert len(messages) == 1
    assert messages[0].startswith("No speed-up: most steps evaluate both predictions.")
    rest = {"add_noise": True, "start": 1, "cfg": CFG}
    assert torch.equal(
        ksampler_advanced(training_free(base), prompts, latent(), **rest)["samples"],
        ksampler_advanced(base, prompts, latent(), **rest)["samples"],
    )


def test_many_steps_say_nothing(base, prompts):
    messages = []
    ksampler(training_free(base, notify=messages.append), prompts, steps=MANY)
    assert messages == []


def test_the_negative_prompt_has_an_effect(base, prompts):
    other = Prompts(prompts.positive, random_prompts(seed=9).positive)
    model = training_free(base)
    assert not torch.equal(ksampler(model, prompts, steps=MANY), ksampler(model, other, steps=MANY))


def test_a_picture_of_a_batch_is_as_it_is_alone(base, prompts):
    noise = {"samples": torch.randn(2, 12, 8, 8, generator=torch.manual_seed(3))}
    together = ksampler(training_free(base), prompts, at=noise, steps=MANY, denoise=0.9, cfg=2.0)
    repeated = {"samples": noise["samples"][:1].repeat(2, 1, 1, 1)}
    alone = ksampler(training_free(base), prompts, at=repeated, steps=MANY, denoise=0.9, cfg=2.0)
    torch.testing.assert_close(together[0], alone[0], atol=1e-3, rtol=1e-3)


def test_cfg_1_strength_0_and_an_empty_range_are_the_base_itself(base, prompts):
    how = {"steps": MANY}
    assert torch.equal(ksampler(training_free(base), prompts, cfg=1.0, **how), ksampler(base, prompts, cfg=1.0, **how))
    expected = ksampler(base, prompts, **how)
    assert torch.equal(ksampler(training_free(base, strength=0.0), prompts, **how), expected)
    assert torch.equal(ksampler(training_free(base, start_percent=0.5, end_percent=0.5), prompts, **how), expected)


def test_bypassing_gives_the_bases_own_pictures_before_and_after(base, prompts):
    before = ksampler(base, prompts, steps=MANY)
    guided = ksampler(training_free(base), prompts, steps=MANY)
    assert torch.equal(ksampler(base, prompts, steps=MANY), before)
    assert not torch.equal(guided, before)


def test_nothing_is_left_of_one_sampling_in_the_next(base, prompts):
    model = training_free(base)
    first = ksampler(model, prompts, steps=MANY)
    ksampler(model, prompts, steps=3, at=latent(2, 6, 10))
    assert torch.equal(ksampler(model, prompts, steps=MANY), first)


def test_nor_of_one_that_was_interrupted(base, prompts):
    model, calls = training_free(base), []

    def fail(executor, x, *args, **kwargs):
        calls.append(x)
        if len(calls) == 5:
            raise RuntimeError("failed on purpose")
        return executor(x, *args, **kwargs)

    failing = model.clone()
    failing.add_wrapper_with_key("diffusion_model", "test", fail)
    with pytest.raises(RuntimeError, match="failed on purpose"):
        ksampler(failing, prompts, steps=MANY)
    assert torch.equal(ksampler(model, prompts, steps=MANY), ksampler(training_free(base), prompts, steps=MANY))


def test_the_override_wins_over_the_samplers_cfg_and_strength_scales_the_guidance(base, prompts):
    overridden = ksampler(training_free(base, guidance_scale=3.0), prompts, cfg=8.0, steps=MANY)
    assert torch.equal(overridden, ksampler(training_free(base), prompts, cfg=3.0, steps=MANY))
    half = ksampler(training_free(base, strength=0.5), prompts, cfg=5.0, steps=MANY)
    assert torch.equal(half, overridden)


def test_nodes_that_adjust_the_combination_have_both_predictions(base, prompts):
    seen = []

    def combine(args):
        seen.append((args["cond_denoised"], args["uncond_denoised"]))
        return args["input"] - args["cond_denoised"]

    model = training_free(base)
    model.set_model_sampler_cfg_function(combine)
    ksampler(model, prompts, steps=MANY)
    assert len(seen) == MANY
    assert not any(torch.equal(*both) for both in seen)  # from the first step on: it may divide by their difference


def test_it_is_not_on_a_model_with_an_adapter_nor_an_adapter_on_it(base, save_adapter):
    file = save_adapter(base)
    for twice in (lambda: training_free(patched(base, file)), lambda: patched(training_free(base), file)):
        with pytest.raises(ValueError, match="guidance of an AGD node already"):
            twice()


@pytest.mark.parametrize("percent", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_positions_are_comfyuis_percent(base, percent):
    sampling = base.get_model_object("model_sampling")
    assert percent_of_sigma(sampling, sampling.percent_to_sigma(percent)) == pytest.approx(percent, abs=1 / 128)


@pytest.mark.parametrize("scheduler", ["normal", "simple", "sgm_uniform"])
def test_nine_steps_are_enough(base, prompts, scheduler):
    assert sum(rows_of(training_free(base), ksampler, prompts, steps=9, scheduler=scheduler)) == 9


class TinySD3(comfy.supported_models.SD3):
    """A flow model whose attentions no adapter knows, at the smallest widths."""

    unet_config = {"in_channels": 16, "patch_size": 2, "depth": 1, "input_size": None, "adm_in_channels": 128}
    unet_config |= {"num_patches": None, "pos_embed_max_size": 32, "pos_embed_scaling_factor": None}
    unet_config |= {"context_embedder_config": {"params": {"in_features": 128, "out_features": 64}}}
    unet_config["context_embedder_config"]["target"] = "torch.nn.Linear"

    def __init__(self):
        super().__init__(self.unet_config)


@pytest.mark.parametrize("scheduler", ["simple", "normal", "beta"])
def test_any_model_will_do(prompts, scheduler):
    counted, rows = training_free(tiny(TinySD3())), []

    def apply_model(executor, x, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", apply_model)
    sampled = ksampler(counted, prompts, steps=20, at=latent(1, channels=16), scheduler=scheduler)
    assert rows == [1] * 20
    assert torch.isfinite(sampled).all()


@pytest.fixture
def on_the_toy(toy, monkeypatch):
    """A function: latents of two captions that `model`, a patched toy, makes."""
    monkeypatch.undo()  # it has been trained
    texts = ["a small red circle left of a large green star on a white background", "a large blue ring"]
    (positive,), (negative,) = encode(toy.clip, texts), encode(toy.clip, [""] * len(texts))
    how = {"prompts": Prompts(positive, negative), "cfg": 3.0, "steps": 20, "at": latent(2)}
    return lambda model, **other: ksampler(model, **{**how, **other})


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_the_toys_pictures_are_near_to_cfgs(toy, on_the_toy):
    """Much nearer than without guidance, and nearer than guidance in the attention alone."""
    guided = on_the_toy(toy.model)
    in_turn = apart(on_the_toy(training_free(toy.model)), guided)
    in_attention = apply_adapter(toy.model, *attention_guidance(describe_base(toy.model.model)), source="it")
    assert in_turn < 0.5 * apart(on_the_toy(in_attention), guided)
    assert in_turn < 0.5 * apart(on_the_toy(toy.model, cfg=1.0), guided)


@pytest.mark.parametrize(("sampler", "at_least", "at_most"), [("euler", 40, 40), ("lcm", 48, 60)])
def test_a_sampler_that_exchanges_all_noise_evaluates_both_more_often(toy, on_the_toy, sampler, at_least, at_most):
    messages = []
    model = training_free(toy.model, notify=messages.append)
    assert at_least <= sum(rows_of(model, on_the_toy, sampler=sampler)) <= at_most
    expected = "About 1.5 evaluations per step: with this sampler and schedule one step tells too little of the next"
    assert [message.partition(",")[0] for message in messages] == [expected] * (sampler == "lcm")

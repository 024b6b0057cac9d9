"""Guidance without training on any model. What it works with is in compatibility/test_table.py."""

import comfy.supported_models
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from comfyui_agd.agd_core import forecast
from comfyui_agd.examples.toy.sampling import encode
from comfyui_agd.tests.support.runtime import (
    Prompts,
    ksampler,
    latent,
    patched,
    random_prompts,
    rows_of,
    tiny,
    training_free,
)

MANY, EVALUATED = 12, 6  # steps, and how many of them are evaluated where all can be forecast


pytestmark = pytest.mark.usefixtures("smooth")


def test_after_three_steps_every_third_one_is_evaluated(base, prompts):
    for batch in (1, 3):
        rows = rows_of(training_free(base), ksampler, prompts, steps=MANY, at=latent(batch))
        assert rows == [2 * batch] * EVALUATED


def test_steps_that_can_not_be_forecast_are_cfgs_own(base, prompts, monkeypatch):
    monkeypatch.setattr(forecast, "TOLERANCE", 0.0)
    messages = []
    model = training_free(base, notify=messages.append)
    assert torch.equal(ksampler(model, prompts, steps=MANY), ksampler(base, prompts, steps=MANY))
    assert [message[:48] for message in messages] == ["Little speed-up: 2.0 model evaluations per step."]


def test_so_are_three_steps(base, prompts):
    assert torch.equal(ksampler(training_free(base), prompts, steps=3), ksampler(base, prompts, steps=3))


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
    assert not any(torch.equal(*both) for both in seen)  # it may divide by their difference


def test_it_is_not_on_a_model_with_an_adapter_nor_an_adapter_on_it(base, save_adapter):
    file = save_adapter(base)
    for twice in (lambda: training_free(patched(base, file)), lambda: patched(training_free(base), file)):
        with pytest.raises(ValueError, match="guidance of an AGD node already"):
            twice()


@pytest.mark.parametrize("scheduler", ["normal", "simple", "karras", "sgm_uniform"])
def test_schedules_are_alike(base, prompts, scheduler):
    assert sum(rows_of(training_free(base), ksampler, prompts, steps=MANY, scheduler=scheduler)) == 2 * EVALUATED


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
    assert rows == [2] * 8
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


def test_the_toys_pictures_are_nearer_to_cfgs_than_cfg_with_as_many_evaluations(toy, on_the_toy):
    true, unguided = on_the_toy(toy.model, steps=50), on_the_toy(toy.model, steps=50, cfg=1.0)
    evaluations = sum(rows_of(training_free(toy.model), on_the_toy)) // 2
    assert 16 <= evaluations <= 24
    found = apart(on_the_toy(training_free(toy.model)), true)
    assert found < apart(on_the_toy(toy.model, steps=evaluations // 2), true)
    assert found < 0.3 * apart(unguided, true)


def test_a_sampler_that_exchanges_all_noise_evaluates_both_more_often(toy, on_the_toy):
    euler, lcm = (sum(rows_of(training_free(toy.model), on_the_toy, sampler=name)) for name in ("euler", "lcm"))
    assert euler < lcm

"""Sampling with an adapter: omega, the base itself wherever it should be, errors. See also compatibility/."""

import logging

import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.tests.support.runtime import (
    CFG,
    STEPS,
    TinyXL,
    custom_sampler,
    ksampler,
    latent,
    patched,
    random_prompts,
    rows_of,
    tiny,
)
from comfyui_agd.tests.support.small import info_for, randomised


@pytest.fixture(scope="module")
def file(base, save_adapter):
    return save_adapter(base)


def test_basic_guider_takes_guidance_from_the_override(base, prompts, save_adapter):
    file = save_adapter(base, kind="cross_attention")  # it makes no difference to it that there is no negative
    model = patched(base, file, guidance_scale=CFG)
    assert rows_of(model, custom_sampler, prompts, "BasicGuider") == [1] * STEPS
    guided = custom_sampler(model, prompts, "BasicGuider")
    assert torch.equal(guided, custom_sampler(patched(base, file), prompts, "CFGGuider"))
    assert not torch.equal(guided, custom_sampler(base, prompts, "BasicGuider"))


def test_basic_guider_without_override_is_the_base(base, prompts, file):
    expected = custom_sampler(base, prompts, "BasicGuider")
    assert torch.equal(custom_sampler(patched(base, file), prompts, "BasicGuider"), expected)


def test_the_override_wins_over_the_samplers_cfg(base, prompts, file):
    overridden = ksampler(patched(base, file, guidance_scale=3.0), prompts, cfg=8.0)
    assert torch.equal(overridden, ksampler(patched(base, file), prompts, cfg=3.0))


@pytest.mark.parametrize("own", [1.0, 3.0])
@pytest.mark.parametrize("follower_first", [False, True])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_of_two_loaders_the_one_without_a_scale_of_its_own_follows_the_sampler(
    base, prompts, save_adapter, own, follower_first, cfg
):
    file, scales = save_adapter(base, kind="low_rank"), [None, own] if follower_first else [own, None]

    def sampled(*scales):
        model = base
        for scale in scales:
            model = patched(model, file, strength=0.5, guidance_scale=scale)
        return ksampler(model, prompts, cfg=cfg)

    torch.testing.assert_close(sampled(*scales), sampled(*(cfg if scale is None else scale for scale in scales)))


def test_omega_is_the_samplers_cfg(base, prompts, file):
    model = patched(base, file)
    assert not torch.equal(ksampler(model, prompts, cfg=3.0), ksampler(model, prompts, cfg=4.0))


@pytest.mark.parametrize("kind", ["cross_attention", "offset"])
def test_a_model_with_y(kind, save_adapter):
    base, prompts = tiny(TinyXL()), random_prompts(pooled=1280)
    model, at = patched(base, save_adapter(base, kind=kind)), latent(2, channels=4)
    assert rows_of(model, ksampler, prompts, at=at) == [2] * STEPS
    assert not torch.equal(ksampler(model, prompts, at=at), ksampler(base, prompts, at=at))


def test_strength_0_is_the_base_with_its_own_cfg(base, prompts, file):
    assert torch.equal(ksampler(patched(base, file, strength=0.0), prompts), ksampler(base, prompts))


def test_omega_1_is_the_base_unguided(base, prompts, file):
    assert torch.equal(ksampler(patched(base, file), prompts, cfg=1.0), ksampler(base, prompts, cfg=1.0))
    overridden = ksampler(patched(base, file, guidance_scale=1.0), prompts, cfg=CFG)
    assert torch.equal(overridden, ksampler(base, prompts, cfg=1.0))


def test_a_new_adapter_is_the_base_unguided(base, prompts):
    info = info_for(describe_base(base.model), kind="cross_attention", hidden=8, encoder_width=8)
    model = apply_adapter(base, info, Adapter(info.config).state_dict(), source="new")
    assert torch.equal(ksampler(model, prompts), ksampler(base, prompts, cfg=1.0))


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (1.0, 1.0), (0.0, 0.0)])
def test_an_empty_range_is_the_base_with_its_own_cfg(base, prompts, file, start, end):
    model = patched(base, file, start_percent=start, end_percent=end)
    assert torch.equal(ksampler(model, prompts), ksampler(base, prompts))


def test_steps_outside_the_range_are_the_bases_own(base, prompts, file):
    rows = rows_of(patched(base, file, start_percent=0.3, end_percent=0.8), ksampler, prompts)
    assert rows == [2, 1, 1, 2]


def test_bypassing_gives_the_bases_own_pictures_before_and_after(base, prompts, file):
    before = ksampler(base, prompts)
    with_adapter = ksampler(patched(base, file), prompts)
    assert torch.equal(ksampler(base, prompts), before)
    assert not torch.equal(with_adapter, before)


def test_the_guiders_cfg_is_restored_after_an_error(base, prompts, file):
    from comfy.samplers import CFGGuider

    model, seen = patched(base, file), []

    def fail(executor, x, *args, **kwargs):
        raise RuntimeError("failed on purpose")

    model.add_wrapper_with_key("diffusion_model", "test", fail)
    guider = CFGGuider(model)
    guider.set_conds(prompts.positive, prompts.negative)
    guider.set_cfg(CFG)
    with pytest.raises(RuntimeError, match="failed on purpose"), torch.inference_mode():
        guider.sample(torch.randn(1, 12, 8, 8), torch.zeros(1, 12, 8, 8), *_euler(model))
    seen.append(guider.cfg)
    assert seen == [CFG]


def _euler(model):
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    return comfy.samplers.sampler_object("euler"), sigmas


def test_guidance_outside_the_trained_range_is_warned_of_once(base, prompts, file, caplog):
    with caplog.at_level(logging.WARNING):
        ksampler(patched(base, file), prompts, cfg=20.0)
    warnings = [record.message for record in caplog.records if "range" in record.message]
    assert warnings == ["AGD: Guidance scale 20 is outside the adapter's range, 1 to 12."]


def test_an_adapter_of_another_base_is_refused(base, save_adapter):
    other = save_adapter(tiny(TinyXL()))
    with pytest.raises(AdapterFileError, match=r"made for TinyXL .* but this model is TinyUNet"):
        patched(base, other)


def test_the_adapter_is_a_model_of_its_own_to_the_memory_manager(base, prompts, file):
    model = patched(base, file)
    (adapter,) = model.get_nested_additional_models()
    info, loaded = adapter_file.load(file)
    assert adapter.model_size() == sum(t.numel() * t.element_size() for t in loaded.state_dict().values())
    assert loaded.parameter_count() == Adapter(info.config).parameter_count()


def test_two_adapters_of_different_seeds_differ(base, prompts, file):
    info = info_for(describe_base(base.model), hidden=8, encoder_width=8)
    other = randomised(Adapter(info.config), seed=9).state_dict()
    first, second = patched(base, file), apply_adapter(base, info, other, source="other")
    assert not torch.equal(ksampler(first, prompts), ksampler(second, prompts))

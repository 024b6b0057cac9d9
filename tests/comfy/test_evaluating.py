"""Whole samples for an evaluation: ComfyUI's own sampler gives what training's Euler gives, and its cost is counted."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import comfy.model_management as mm
import pytest
import torch
from comfy.utils import get_attr

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones import backbone_of, is_trained_on
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.memory import ComfyMemory
from comfyui_agd.agd_core.comfyui.model.sampler import ComfySampler
from comfyui_agd.agd_core.comfyui.sampling.schedule import percent_of
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.nodes import common
from comfyui_agd.tests.support.runtime import Prompts, TinyUNet, ksampler, latent, tiny
from comfyui_agd.tests.support.small import info_for
from comfyui_agd.tests.support.tiny_families import conditioning, empty_latent, tiny_model
from comfyui_agd.training.assess import AssessConfig, Candidate, PromptTexts, assess
from comfyui_agd.training.euler_sample import SampleSettings, sample

STEPS, OMEGA, SHAPE = 5, 4.0, (12, 8, 8)


@pytest.mark.parametrize("kind", ["cross_attention", "delta"])
@pytest.mark.parametrize("rule", [GuidanceRule(), GuidanceRule("apg", threshold=1.0), GuidanceRule("cfg_zero")])
def test_samples_are_those_of_training(toy, save_adapter, kind, rule, monkeypatch):
    monkeypatch.setattr(toy.model.model.latent_format, "scale_factor", 0.3)  # as other models have one
    info, adapter = adapter_file.load(save_adapter(toy.model, kind=kind))
    model = ComfyModel(toy.model, toy.clip)
    encode = model.text_encoder.encode
    prompt, negative = encode(["a red star"]) + encode(["a large blue ring"], "negative")
    sampler = ComfySampler(toy.model, info, adapter.state_dict(), source="a", rule=rule)
    ticks, found = [], {}
    for method in ("unguided", "guided", "agd"):
        noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3))
        what = method, noise, (prompt, negative)
        found[method], rows = sampler(*what, omega=OMEGA, steps=STEPS, progress=partial(ticks.append, method))
        assert rows == STEPS * {"unguided": 1, "guided": 2, "agd": 1}[method]
        assert ticks.count(method) == STEPS
    what, settings = (model.denoiser, prompt, negative), SampleSettings(SHAPE, OMEGA, steps=STEPS, seed=3)
    with model.denoiser.session():
        unguided = sample(*what, replace(settings, omega=1.0))
        guided = sample(*what, replace(settings, rule=rule))
        agd = sample(*what, settings, adapter)
    for method, expected in (("unguided", unguided), ("guided", guided), ("agd", agd)):
        torch.testing.assert_close(found[method], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(guided, unguided, atol=0.1)
    assert not torch.allclose(agd, unguided, atol=0.1)


@pytest.mark.parametrize(("levels", "rows"), [((2.0, 0.0), 8), ((0.0, 2.0), 7), ((0.0, 0.0), 5)])
def test_an_adapter_of_some_noise_levels_guides_there_and_cfg_elsewhere(toy, save_adapter, levels, rows):
    info, adapter = adapter_file.load(save_adapter(toy.model, kind="cross_attention"))
    model = ComfyModel(toy.model, toy.clip)
    sigmas = model.denoiser.sigmas("normal", STEPS)[:-1]
    assert sorted(sigmas > 2.0) == [False] * 3 + [True] * 2
    encode = model.text_encoder.encode
    prompts = encode(["a red star"])[0], encode(["a large blue ring"], "negative")[0]
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    sampler = ComfySampler(toy.model, info, adapter.state_dict(), source="a", noise_levels=levels)
    _, found = sampler("agd", noise, prompts, omega=OMEGA, steps=STEPS, progress=lambda: None)
    assert found == rows


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_a_noise_level_is_found_in_the_schedule(toy, sigma):
    schedule = toy.model.get_model_object("model_sampling")
    assert float(schedule.percent_to_sigma(percent_of(schedule, sigma))) == pytest.approx(sigma, rel=1e-4)


def test_on_a_card_that_is_too_small_a_part_of_the_model_stays_in_system_memory(toy, card, monkeypatch, save_adapter):
    """As when ComfyUI samples, in place of all of it at once."""
    base, loaded = tiny(TinyUNet()), []
    info, adapter = adapter_file.load(save_adapter(base))
    size = base.model_size()
    card(size // 2, base)
    monkeypatch.setattr(mm, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
    monkeypatch.setattr(ComfyMemory, "available", lambda memory: size // 2)
    monkeypatch.setattr(ComfyMemory, "trace_base", lambda *args: SimpleNamespace(peak_bytes=size // 8))
    model = ComfyModel(base, toy.clip)
    denoise = model.denoiser.denoise
    monkeypatch.setattr(model.denoiser, "denoise", lambda *args: loaded.append(base.loaded_size()) or denoise(*args))
    sampler = ComfySampler(base, info, adapter.state_dict(), source="a")
    config = AssessConfig(omegas=(3.0,), steps=1, count=1, width=64, height=64)
    assess(model, sampler, Candidate(info, adapter.state_dict(), "a"), PromptTexts(["a red star"]), config)
    assert loaded
    assert max(loaded) <= size // 2 - size // 8


def test_the_model_is_left_as_it_was(toy, save_adapter):
    info, adapter = adapter_file.load(save_adapter(toy.model))
    before = {name: value.clone() for name, value in toy.model.model.state_dict().items()}
    model = ComfyModel(toy.model, toy.clip, vae=toy.vae)
    sampler = ComfySampler(toy.model, info, adapter.state_dict(), source="a")
    config = AssessConfig(omegas=(3.0,), steps=2, count=2, width=64, height=64)
    candidate = Candidate(info, adapter.state_dict(), "a")
    found = assess(model, sampler, candidate, PromptTexts(["a red star"]), config)
    assert found.costs["guided"].evaluations_per_step == 2
    assert all(torch.equal(value, before[name]) for name, value in toy.model.model.state_dict().items())
    assert not toy.model.wrappers


def test_an_interrupt_comes_through(toy, save_adapter):
    info, adapter = adapter_file.load(save_adapter(toy.model))
    model = ComfyModel(toy.model, toy.clip)
    sampler = ComfySampler(toy.model, info, adapter.state_dict(), source="a")

    def interrupt(progress):
        if progress.phase == "sample" and progress.step == 7:
            raise mm.InterruptProcessingException

    config = AssessConfig(omegas=(3.0,), steps=2, count=1, width=64, height=64)
    candidate = Candidate(info, adapter.state_dict(), "a")
    with pytest.raises(mm.InterruptProcessingException):
        assess(model, sampler, candidate, PromptTexts(["a star"]), config, interrupt)


def test_weights_are_told_apart(toy):
    own = ComfyModel(toy.model, toy.clip).base
    model = toy.model
    assert is_trained_on(own, model)
    weight = model.model.diffusion_model.out[-1].weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.1)
        assert not is_trained_on(own, model)
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def changed_at_both_ends(model):
    """As LoRAs of some kinds change it, in its first and last layers too."""
    changed = model.clone()
    for name in backbone_of(model.model).first_and_last():
        key = f"diffusion_model.{name}"
        changed.add_patches({key: ("diff", (torch.ones_like(get_attr(model.model, key)),))}, 1.0)
    return changed


@pytest.mark.parametrize("family", ["unet", "sd3"])
def test_a_checkpoint_keeps_its_fingerprint_whatever_was_sampled(prompts, toy, monkeypatch, family):
    if family == "unet":
        model, given, at = tiny(TinyUNet()), prompts, latent()
    else:
        model, at = tiny_model(family), empty_latent(family)
        given = Prompts(conditioning(family, "a fox"), conditioning(family, "blurry"))
    before = ComfyModel(model, toy.clip).base
    assert before.fingerprint != ComfyModel(tiny(TinyUNet(), seed=1), toy.clip).base.fingerprint
    said, info = [], info_for(before, hidden=8, encoder_width=8)
    adapter = common.AdapterValue(info, Adapter(info.config).state_dict(), "file")
    monkeypatch.setattr(common, "notices", lambda node_id: said.append)
    changed, first = changed_at_both_ends(model), f"diffusion_model.{backbone_of(model.model).first_and_last()[0]}"
    own = get_attr(model.model, first).clone()
    for _ in range(2):
        loaded = common.use_adapter(changed, adapter, "1", guidance_scale=0.0)
        ksampler(loaded, given, at=at, steps=1)
        assert not torch.equal(get_attr(model.model, first), own)
        assert ComfyModel(changed, toy.clip).base == ComfyModel(model, toy.clip).base == before
    assert not any("other weights" in message for message in said)

"""Whole samples for an evaluation: ComfyUI's own sampler gives what training's Euler gives, and its cost is counted."""

from dataclasses import replace
from functools import partial

import comfy.model_management
import pytest
import torch
from comfy.utils import get_attr

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones import backbone_of, is_trained_on
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.sampler import ComfySampler
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
            raise comfy.model_management.InterruptProcessingException

    config = AssessConfig(omegas=(3.0,), steps=2, count=1, width=64, height=64)
    candidate = Candidate(info, adapter.state_dict(), "a")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
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

"""A stopped training whose model was changed in between is not gone on with, and the message says what changed."""

from dataclasses import replace

import comfy.model_management as mm
import comfy.weight_adapter
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.patches_digest import patches_digest
from comfyui_agd.tests.support.analytic import CONFIG as ANALYTIC
from comfyui_agd.tests.support.analytic import PROMPTS, Stopped, stop_after
from comfyui_agd.training.run_identity import DifferentRun, run_identity
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import train

CONFIG = replace(ANALYTIC, iterations=4, held_out=0, pool=1, batch=1)
KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"


def lora(shape: torch.Size, seed: int) -> comfy.weight_adapter.LoRAAdapter:
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*each, generator=generator) for each in ((shape[0], 2), (2, shape[1])))
    return comfy.weight_adapter.LoRAAdapter(set(), (up, down, 2.0, None, None, None))


def with_lora(model, strength: float = 1.0, seed: int = 0):
    model = model.clone()
    assert model.add_patches({KEY: lora(model.model.state_dict()[KEY].shape, seed)}, strength)
    return model


def with_lora_on_text_encoder(clip, strength: float):
    clip = clip.clone()
    (key,) = [key for key in clip.patcher.model.state_dict() if key.endswith("layers.0.self_attn.q_proj.weight")]
    assert clip.add_patches({key: lora(clip.patcher.model.state_dict()[key].shape, 0)}, strength)
    return clip


def skipping(clip):
    clip = clip.clone()
    clip.clip_layer(-2)
    return clip


CHANGES = {
    "a LoRA's strength": (lambda base, clip: (with_lora(base, 0.3), clip), "other LoRAs or other strengths"),
    "another LoRA": (lambda base, clip: (with_lora(base, seed=1), clip), "other LoRAs or other strengths"),
    "no LoRA": (lambda base, clip: (base, clip), "other LoRAs or other strengths"),
    "a LoRA of the text encoder": (
        lambda base, clip: (with_lora(base), with_lora_on_text_encoder(clip, 1e-3)),
        "other LoRAs or other strengths",
    ),
    "the noise schedule": (
        lambda base, clip: (ModelSamplingDiscrete().patch(with_lora(base), "eps", True)[0], clip),
        "another noise schedule",
    ),
    "the prediction": (
        lambda base, clip: (ModelSamplingDiscrete().patch(with_lora(base), "v_prediction", False)[0], clip),
        "another noise schedule",
    ),
    "clip skip": (lambda base, clip: (with_lora(base), skipping(clip)), "another text encoder or clip skip"),
}


@pytest.fixture(scope="module")
def stopped(base, toy, tmp_path_factory):
    """The folder of a training with a LoRA that was stopped."""
    folder = tmp_path_factory.mktemp("stopped") / "a.run"
    with pytest.raises(Stopped):
        train(ComfyModel(with_lora(base), toy.clip), PROMPTS, CONFIG, stop_after(2), RunOptions(folder=folder))
    return folder


@pytest.mark.parametrize("changed", CHANGES)
def test_a_run_whose_model_changed_is_refused_in_the_users_words(base, toy, stopped, changed):
    change, said = CHANGES[changed]
    told = rf"^A training of this name was begun with {said}[^:]*: use those to go on with it, or delete its folder"
    with pytest.raises(DifferentRun, match=told):
        train(ComfyModel(*change(base, toy.clip)), PROMPTS, CONFIG, options=RunOptions(folder=stopped))


def test_a_model_that_is_loaded_and_patched_in_place_is_the_same(base, toy):
    def identity():
        return run_identity(ComfyModel(with_lora(base), toy.clip), PROMPTS, CONFIG, RunOptions())

    mm.unload_all_models()
    before, loaded = identity(), with_lora(base)
    mm.load_models_gpu([loaded], force_full_load=True)
    assert identity() == before


def test_a_digest_is_of_all_that_patches_hold_and_the_same_in_every_process():
    values = torch.arange(6.0).reshape(2, 3)
    patches = {"b": [(0.5, ("diff", (values,)), 1.0, None, None)]}
    patches["a"] = [(1.0, comfy.weight_adapter.LoRAAdapter({"x"}, (values, values.T, 4.0, None)), 1.0, None, abs)]
    merge = {"a": [(0.5, [(values.bfloat16(), lambda weight: weight)], 0.5, (0, 0, 2), None)]}
    assert patches_digest({}, {}) == ""
    assert patches_digest(patches, {}) == patches_digest(dict(sorted(patches.items())), {}) == "cb5ee5de58a9abf7"
    assert patches_digest(merge) == "35011409abe2eff0"
    assert patches_digest({}, patches) != patches_digest(patches, {})


def test_any_value_of_a_lora_tells():
    def digest(at: int) -> str:
        values = torch.zeros(64, 64)
        values.view(-1)[at] = 1e-6
        return patches_digest({"a": [(1.0, ("diff", (values,)), 1.0, None, None)]})

    assert len({digest(at) for at in (0, 1, 100, 4095)}) == 4

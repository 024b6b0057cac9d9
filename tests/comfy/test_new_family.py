"""The recipes of docs/architecture.md, followed: a made-up family and a made-up kind, from nothing to an adapter."""

import dataclasses
import re
from pathlib import Path

import comfy.sd
import pytest
import torch

from comfyui_agd.agd_core import adapter_file, families, kinds
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.comfyui.backbones import UnsupportedModel, backbone_of, describe_base
from comfyui_agd.agd_core.comfyui.guided_step import ActiveAdapter, GuidedStep
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.sampling import merging, messages
from comfyui_agd.agd_core.lora import lora
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, of_kind
from comfyui_agd.tests.support.made_up import MadeUp
from comfyui_agd.tests.support.runtime import CFG, STEPS, TinyUNet, ksampler, patched, rows_of, tiny
from comfyui_agd.tests.support.small import info_for, randomised
from comfyui_agd.training.presets import settings_for
from comfyui_agd.training.trainer import train

ARCHITECTURE = (Path(__file__).resolve().parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")


def code_of(heading: str) -> str:
    """The code block of a recipe."""
    return re.search(rf"## {heading}\n.*?```python\n(.*?)```", ARCHITECTURE, re.S)[1]


@pytest.fixture
def family(monkeypatch):
    """The recipe's row, in the table."""
    row = eval(code_of("A new family"), {"Family": families.Family})
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, row))
    return row


@pytest.fixture
def base():
    return tiny(MadeUp())


@pytest.fixture
def prompts(toy_prompts):
    return toy_prompts


@pytest.fixture
def file(family, base, tmp_path):
    info = info_for(describe_base(base.model), "low_rank", hidden=4, encoder_width=8)
    adapter = randomised(Adapter(info.config))
    return adapter_file.save(tmp_path / "adapter.safetensors", adapter, info)


def test_without_a_row_what_its_structure_tells_is_adapted_with_a_note(base, prompts, tmp_path):
    info, notes = info_for(describe_base(base.model), "low_rank", hidden=4, encoder_width=8), []
    assert [layer.name for layer in info.base.layers] == ["stripes_0", "stripes_1"]
    assert (info.base.layers[0].context_dim, info.base.vector) == (128, 0)
    file = adapter_file.save(tmp_path / "adapter.safetensors", randomised(Adapter(info.config)), info)
    guided = ksampler(patched(base, file, notify=notes.append), prompts)
    assert not torch.equal(guided, ksampler(base, prompts, cfg=1.0))
    assert notes[0] == messages.KNOWN_BY_STRUCTURE


def test_with_a_row_there_is_no_note(family, base, prompts, file):
    notes = []
    ksampler(patched(base, file, notify=notes.append), prompts)
    assert messages.KNOWN_BY_STRUCTURE not in notes


def test_prompts_of_another_width_than_the_structure_tells_are_refused(base, toy):
    base.model.diffusion_model.text = torch.nn.Linear(64, 32)
    config = dataclasses.replace(CONFIG, kind="low_rank", rank=4)
    with pytest.raises(ValueError, match=r"prompts have 128 channels, .* has 64: its family needs a row"):
        train(ComfyModel(base, toy.clip), PROMPTS, config)


@pytest.mark.parametrize("config", [MadeUp, TinyUNet])
def test_a_network_of_another_layout_than_its_row_says_is_refused(family, config, monkeypatch):
    model = tiny(config()).model
    monkeypatch.setattr(families, "FAMILIES", (families.Family("TinyUNet", "A UNet"), family))
    model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match=r"Choose 'training-free' .* this model is a Linear"):
        describe_base(model)


def test_with_it_the_layers_of_its_blocks_are_found(family, base):
    info = describe_base(base.model)
    assert (info.family_name, info.layout, info.prediction) == ("Made-up", "transformer", "EPS")
    assert [(layer.name, layer.path) for layer in info.layers] == [
        ("stripes_0", "stripes.0"),
        ("stripes_1", "stripes.1"),
    ]
    assert [linear.path for linear in info.layers[0].linears] == ["qkv", "out", "mlp.0", "mlp.2"]
    assert info.vector == 32


@pytest.mark.parametrize("merges", [True, False])
def test_an_adapter_samples_in_one_evaluation_per_step(base, prompts, file, monkeypatch, merges):
    if not merges:
        monkeypatch.setattr(merging, "can_merge", lambda guider, lora: False)
    guided = ksampler(patched(base, file), prompts)
    assert rows_of(patched(base, file), ksampler, prompts)[-STEPS:] == [1] * STEPS
    weights = lora(*adapter_file.load_weights(file), omega=CFG)
    merged, _ = comfy.sd.load_lora_for_models(base, None, weights, 1.0, 0.0)
    assert len(merged.patches) == 8  # every linear layer of both blocks
    torch.testing.assert_close(guided, ksampler(merged, prompts, cfg=1.0), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(guided, ksampler(base, prompts, cfg=1.0))


@pytest.mark.parametrize(("how", "cfg"), [({"strength": 0.0}, CFG), ({}, 1.0)])
def test_where_it_has_nothing_to_do_the_picture_is_the_bases(base, prompts, file, how, cfg):
    assert torch.equal(ksampler(patched(base, file, **how), prompts, cfg=cfg), ksampler(base, prompts, cfg=cfg))


def test_the_hooks_are_there_for_one_evaluation_at_a_time(base, file):
    adapter, network = adapter_file.load(file)[1], base.model.diffusion_model
    active = ActiveAdapter(adapter, torch.full((1,), CFG), torch.ones(1))
    x, t, context = torch.randn(1, 12, 8, 8), torch.full((1,), 500.0), torch.randn(1, 16, 128)
    alone = network(x, t, context=context)
    with backbone_of(base.model).intercept(GuidedStep((active,))):
        once, again = (network(x, t, context=context) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.allclose(once, alone)
    with pytest.raises(RuntimeError), backbone_of(base.model).intercept(GuidedStep((active,))):
        network(x, t, context=context[:, :, :7])  # of another width: it fails within
    assert torch.equal(network(x, t, context=context), alone)


def test_its_evaluations_are_counted_though_it_runs_no_hook_of_comfyui(base, prompts):
    assert rows_of(base, ksampler, prompts) == [2] * STEPS


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_a_training_closes_a_part_of_the_gap(family, base, toy, checkpointing):
    model = ComfyModel(base, toy.clip)
    settings = of_kind("low_rank").own_settings() | {
        "checkpointing": checkpointing,
        "learning_rate": 1e-3,
        "iterations": 30,
    }
    config = settings_for(model.base, {key: settings[key] for key in settings.keys() - family.settings.keys()})
    assert config.kind == "low_rank"
    trained = train(model, PROMPTS, config)
    assert min(trained.evaluation.gap_closed.values()) > 0
    assert all(layer.weight.any() for layer in trained.adapter.zero_initialised())


def test_kinds_that_have_no_place_in_it_are_refused_in_a_sentence(family, base, tmp_path):
    info = info_for(describe_base(base.model), "delta", hidden=4, encoder_width=8)
    file = adapter_file.save(tmp_path / "delta.safetensors", Adapter(info.config), info)
    with pytest.raises(UnsupportedModel, match=r"kind delta has no place in this model: train one of kind low_rank"):
        patched(base, file)


def test_such_a_kind_is_not_trained_either(family, base, toy):
    with pytest.raises(UnsupportedModel, match=r"kind delta has no place in this model"):
        train(ComfyModel(base, toy.clip), PROMPTS, CONFIG)


def test_another_familys_adapter_is_refused_with_both_named(family, base, file):
    with pytest.raises(AdapterFileError, match=r"This adapter is for Made-up, your checkpoint is TinyUNet\."):
        patched(tiny(TinyUNet()), file)


def test_a_new_kind_is_a_class_and_an_entry(monkeypatch, toy, toy_prompts, tmp_path):
    names = {}
    exec(code_of("A new kind"), names)
    new = names["BiasAdapter"]
    monkeypatch.setitem(kinds.KINDS, new.Config.name, new)
    base = tiny(TinyUNet())
    config = dataclasses.replace(CONFIG, kind="bias", learning_rate=1e-2)
    trained = train(ComfyModel(base, toy.clip), PROMPTS, config)
    file = adapter_file.save(tmp_path / "bias.safetensors", trained.adapter, trained.info)
    assert "bias, 224 parameters" in adapter_file.describe(adapter_file.read_info(file), file)
    assert rows_of(patched(base, file), ksampler, toy_prompts) == [1] * STEPS
    assert not torch.equal(ksampler(patched(base, file), toy_prompts), ksampler(base, toy_prompts, cfg=1.0))
    assert torch.equal(ksampler(patched(base, file), toy_prompts, cfg=1.0), ksampler(base, toy_prompts, cfg=1.0))

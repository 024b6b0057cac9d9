"""Training that begins with another adapter's weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.config import BaseInfo
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel, Stopped, assert_same, stop_after
from comfyui_agd.tests.support.small import config_for, info_for, small_layer
from comfyui_agd.training.job import Job
from comfyui_agd.training.presets import settings_for
from comfyui_agd.training.run_identity import DifferentRun, run_identity
from comfyui_agd.training.run_setup import RunOptions, Start
from comfyui_agd.training.trainer import Callbacks, train

SHORT = replace(CONFIG, iterations=2, evaluate_every=0)
NEGATIVE = ["", "a blot"]


@pytest.fixture
def save(tmp_path):
    def save(**settings):
        trained = train(AnalyticModel(), PROMPTS, replace(SHORT, **settings), options=RunOptions(negative=NEGATIVE))
        return adapter_file.save(tmp_path / f"{settings['kind']}.safetensors", trained.adapter, trained.info)

    return save


def begun(start, **settings):
    """An adapter after a step too small to move it."""
    config = replace(SHORT, iterations=1, learning_rate=1e-30, **settings)
    return train(
        AnalyticModel(), PROMPTS, config, options=RunOptions(negative=NEGATIVE, start=start)
    ).adapter.state_dict()


@pytest.mark.parametrize("kind", ["delta", "scale", "cross_attention"])
def test_one_of_the_same_kind_goes_on(save, kind):
    file = save(kind=kind)
    expected, found = adapter_file.load_weights(file)[1], begun(file, kind=kind)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_scale_adapter_is_the_scale_of_delta(save):
    file = save(kind="scale", learning_rate=0.1)
    scale, found = adapter_file.load_weights(file)[1]["kind.to_scale.weight"], begun(file, kind="delta")
    assert torch.equal(found["kind.scale.to_scale.weight"], scale)
    assert not torch.equal(begun(None, kind="delta")["kind.scale.to_scale.weight"], scale)


def test_of_a_scale_adapter_the_layers_are_taken_that_delta_works_in():
    layers = tuple(small_layer(f"input_1_{index}", "a", 24 + index) for index in range(3))
    scale, delta = (
        Adapter(config_for(layers, kind, **more)) for kind, more in (("scale", {}), ("delta", {"attention_every": 2}))
    )
    info = info_for(BaseInfo("SD15", "EPS", layers), "scale")
    with torch.no_grad():
        scale.kind.to_scale.weight.normal_()
    Start(info, scale.state_dict(), Path("scale.safetensors")).copy_into(delta)
    first, _, last = scale.kind.to_scale.weight.split([24, 25, 26])
    assert torch.equal(delta.kind.scale.to_scale.weight, torch.cat([first, last]))


@pytest.mark.parametrize("other", [{"kind": "cross_attention"}, {"kind": "delta", "hidden": 12}])
def test_one_that_does_not_fit_is_refused(save, other):
    with pytest.raises(ValueError, match=r"can't be the start of one of kind delta, hidden 8"):
        begun(save(**other), kind="delta")


def test_one_of_another_base_is_refused(save, tmp_path):
    info, adapter = adapter_file.load(save(kind="delta"))
    other = replace(info, base=BaseInfo("Other", "V_PREDICTION", info.base.layers))
    file = adapter_file.save(tmp_path / "other.safetensors", adapter, other)
    with pytest.raises(AdapterFileError, match="was made for Other"):
        begun(file, kind="delta")


@pytest.mark.parametrize("other", ["base", "width"])
def test_what_can_not_be_the_start_is_refused_before_any_prompt_is_encoded(save, tmp_path, monkeypatch, other):
    """Encoding thousands of prompts takes minutes, and so does counting what the training takes."""
    info, adapter = adapter_file.load(save(kind="delta"))
    base = BaseInfo("Other", "V_PREDICTION", info.base.layers) if other == "base" else info.base
    start = adapter_file.save(tmp_path / "other.safetensors", adapter, replace(info, base=base))
    config = replace(SHORT, kind="delta", hidden=8 if other == "base" else 12)
    job = Job(AnalyticModel(), PROMPTS, config, tmp_path / "a.safetensors", start=start)
    monkeypatch.setattr(AnalyticModel, "encode", lambda *_: pytest.fail("a prompt was encoded"))
    for refused in (job.plan, lambda: job.run(Callbacks(), None, {})):
        with pytest.raises(ValueError, match=r"was made for Other|can't be the start of one of kind delta, hidden 12"):
            refused()
    assert not job.folder.exists()


def test_a_run_that_was_stopped_goes_on_from_its_state_and_not_from_the_start_again(save, tmp_path):
    start, config = save(kind="scale"), replace(CONFIG, kind="delta")
    whole = train(AnalyticModel(), PROMPTS, config, options=RunOptions(negative=NEGATIVE, start=start))
    how = {"negative": NEGATIVE, "folder": tmp_path / "a.run"}
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, config, stop_after(5), options=RunOptions(start=start, **how))
    with pytest.raises(DifferentRun, match="start"):
        train(AnalyticModel(), PROMPTS, config, options=RunOptions(**how))
    kept = start.read_bytes()
    assert save(kind="scale", seed=1) == start  # another adapter in its place
    with pytest.raises(DifferentRun, match="start"):
        train(AnalyticModel(), PROMPTS, config, options=RunOptions(start=start, **how))
    start.write_bytes(kept)
    assert_same(train(AnalyticModel(), PROMPTS, config, options=RunOptions(start=start, **how)), whole)


def test_a_run_of_the_paper_authors_code_is_named_by_the_checkpoint_that_is_taken(tmp_path):
    """As everywhere else, a folder stands for its newest checkpoint."""

    def start() -> str:
        return run_identity(AnalyticModel(), PROMPTS, SHORT, RunOptions(start=tmp_path / "theirs"))["start"]

    (tmp_path / "theirs" / "checkpoints").mkdir(parents=True)
    for name in ("0000500.pt", "0005000.pt"):
        (tmp_path / "theirs" / "checkpoints" / name).write_text(name)
    before = start()
    assert before.startswith("theirs, ")
    (tmp_path / "theirs" / "checkpoints" / "0000500.pt").write_text("another")
    assert start() == before
    (tmp_path / "theirs" / "checkpoints" / "0005000.pt").write_text("another")
    assert start() != before


def test_the_runs_config_begins_from_there_again(save, tmp_path):
    start, output = save(kind="scale"), tmp_path / "delta.safetensors"
    job = Job(AnalyticModel(), PROMPTS, replace(SHORT, kind="delta"), output, NEGATIVE, start=start)
    job.run(Callbacks(), None, {})
    assert f"start = {json.dumps(str(start))}\n" in (job.folder / "config.toml").read_text()


def test_a_scale_adapter_has_settings_of_its_own():
    base = AnalyticModel().base
    scale, training = settings_for(base, {"kind": "scale"}), settings_for(base, {})
    assert scale.iterations < training.iterations / 5
    assert scale.learning_rate > 10 * training.learning_rate
    assert settings_for(base, {"kind": "scale", "iterations": 7}).iterations == 7

"""How many batches a run keeps to learn from again: as many as system memory had a place for when it began."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel, Stopped, assert_same, stop_after
from comfyui_agd.training.plan import Plan
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Callbacks, Trained, train

REUSED = replace(CONFIG, reuse=2, reuse_from=8, iterations=16, held_out=0)


def trained_with(kept: int, folder: Path | None = None, callbacks: Callbacks = Callbacks()) -> Trained:
    """`kept`: batches that memory has a place for now; 0: without a plan."""
    whole_batch = Plan(0, 0, 0, 0, CONFIG.batch, 2 * CONFIG.batch, False, 0, 0, 0, 0, 0, 0, None, None)
    plan = replace(whole_batch, kept_batches=kept) if kept else None
    return train(AnalyticModel(), PROMPTS, REUSED, callbacks, RunOptions(plan=plan, folder=folder))


def test_a_run_keeps_as_many_as_are_planned():
    few, all_of_them = trained_with(2), trained_with(8)
    assert few.losses != all_of_them.losses
    assert_same(all_of_them, trained_with(0))


@pytest.mark.parametrize("computes_in", [torch.float32, torch.bfloat16])
def test_a_stopped_run_goes_on_to_the_same_result_whatever_memory_there_is_then(tmp_path, monkeypatch, computes_in):
    monkeypatch.setattr(AnalyticModel, "computes_in", computes_in)
    whole = trained_with(2)
    with pytest.raises(Stopped):
        trained_with(2, tmp_path / "a.run", stop_after(9))
    assert_same(whole, trained_with(8, tmp_path / "a.run"))


def test_what_a_saved_state_held_is_not_kept_beside_what_goes_on_from_it(tmp_path, monkeypatch):
    folder, loaded, real = tmp_path / "a.run", [], torch.load
    with pytest.raises(Stopped):
        trained_with(8, folder, stop_after(9))
    monkeypatch.setattr(torch, "load", lambda *args, **options: loaded.append(real(*args, **options)) or loaded[-1])
    trained_with(8, folder)
    assert loaded == [{}]

"""A training whose number of iterations changes while it runs, as it does by the clock."""

import json
from dataclasses import replace

from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Callbacks, train

LONG = replace(CONFIG, iterations=40, held_out=0, learning_rate=1e-3)


def rates(folder, iterations=lambda step, planned: planned) -> tuple[list[float], list[int]]:
    """The learning rate of every iteration, and of how many it was said to be."""
    totals = []
    callbacks = Callbacks(lambda progress: totals.append(progress.total), iterations=iterations)
    train(AnalyticModel(), PROMPTS, LONG, callbacks, options=RunOptions(folder=folder))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["learning_rate"] for line in lines if "learning_rate" in line], totals


def test_a_training_that_is_cut_short_ends_there_with_its_rate_fallen(tmp_path):
    planned, _ = rates(tmp_path / "planned.run")
    found, totals = rates(tmp_path / "cut.run", lambda step, planned: planned if step < 10 else 20)
    assert (len(planned), len(found)) == (40, 20)
    assert found[:10] == planned[:10]
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] < 0.02 * LONG.learning_rate
    assert totals[-1] == 20


def test_a_training_may_grow_again(tmp_path):
    found, _ = rates(tmp_path / "a.run", lambda step, planned: 20 if step < 10 else planned)
    assert len(found) == 40
    assert found[-1] < 0.02 * LONG.learning_rate

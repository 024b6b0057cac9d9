"""Several processes that train one adapter do what one does. gloo on the CPU; nccl needs two GPUs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel, reported, weights
from comfyui_agd.tests.support.ranks import Finished, train_together
from comfyui_agd.training.distributed import Ranks
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Trained, train

VARIED = {"aspect_ratios": ("1:1", "2:1"), "reuse": 2, "on_policy": 0.5, "on_policy_from": 0.2, "iterations": 10}


@pytest.fixture(scope="module")
def alone() -> Trained:
    return train(AnalyticModel(), PROMPTS, replace(CONFIG, **VARIED))


def assert_as_alone(ranks: list[Finished], alone: Trained) -> None:
    """To the accuracy of another order of sums."""
    expected = reported(alone)
    for rank in ranks:
        assert rank.status == 0, rank.output
        assert rank.trained["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        torch.testing.assert_close(rank.trained["weights"], weights(alone), rtol=1e-3, atol=1e-3)
        scores = [entry["score"] for entry in rank.trained["history"]]
        assert scores == pytest.approx([entry["score"] for entry in expected["history"]], abs=1e-3)
    first = ranks[0].trained["training"]
    for key in ("teacher_evaluations", "iterations", "best_step", "batch"):
        assert first[key] == expected["training"][key]
    assert all(torch.equal(rank.trained["weights"], ranks[0].trained["weights"]) for rank in ranks)


def metrics(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_two_ranks_train_what_one_does(tmp_path, alone):
    ranks = train_together(2, tmp_path / "a.run", **VARIED)
    assert_as_alone(ranks, alone)
    assert len(metrics(tmp_path / "a.run")) == len(alone.losses) + len(alone.history)


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_another_number_of_them(tmp_path, alone):
    folder = tmp_path / "a.run"
    stopped = train_together(2, folder, stop=7, **VARIED)
    assert all(rank.status for rank in stopped)
    assert "Stopped" in stopped[1].output
    assert "KeyboardInterrupt" in stopped[0].output
    assert [path.name for path in sorted(folder.glob("state-*"))] == ["state-000005.pt", "state-000007.pt"]
    resumed = train(AnalyticModel(), PROMPTS, replace(CONFIG, **VARIED), options=RunOptions(folder=folder))
    assert_as_alone([Finished(0, "", {**reported(resumed), "weights": weights(resumed)})], alone)
    assert len(metrics(folder)) == len(alone.losses) + len(alone.history)


@pytest.mark.slow
def test_ranks_that_are_stopped_where_one_of_them_rolls_out_stop_together_after_the_iteration(tmp_path, alone):
    folder = tmp_path / "a.run"
    stopped = train_together(2, folder, stop=1, phase="rollout", **VARIED)
    assert all(rank.status for rank in stopped)
    assert "Stopped" in stopped[1].output
    assert "KeyboardInterrupt" in stopped[0].output
    (state,) = folder.glob("state-*")
    assert len([line for line in metrics(folder) if "loss" in line]) == int(state.stem[-6:])
    resumed = train(AnalyticModel(), PROMPTS, replace(CONFIG, **VARIED), options=RunOptions(folder=folder))
    assert_as_alone([Finished(0, "", {**reported(resumed), "weights": weights(resumed)})], alone)


def test_alone_nothing_is_sent():
    with Ranks() as ranks:
        x = torch.arange(4.0)
        assert ranks.first
        assert ranks.rows(4) == range(4)
        assert ranks.sum(x) is x
        assert ranks.gather(x) is x
        assert ranks.broadcast(x) is x
        assert ranks.any(True)
        assert not ranks.any(False)


def as_rank(monkeypatch, rank: int, count: int) -> None:
    """Every `Ranks` from now on, with nobody to talk to."""
    monkeypatch.setattr(Ranks, "__init__", lambda self: vars(self).update(rank=rank, count=count))


def test_rows_are_blocks_of_the_batch(monkeypatch):
    rows = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        rows += Ranks().rows(6)
    assert rows == list(range(6))


def test_a_batch_that_ranks_can_not_share_is_refused(monkeypatch):
    as_rank(monkeypatch, 1, 2)
    with pytest.raises(ValueError, match="A batch of 3 can't be shared by 2 processes; make it a multiple"):
        train(AnalyticModel(), PROMPTS, replace(CONFIG, batch=3))

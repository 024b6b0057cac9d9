"""benchmarks/inference.py and training.py on tiny bases: what a row holds, and that one failure is one row's."""

import pytest
import torch

from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.benchmarks import inference, training

METHODS = ("unguided", "cfg", "agd", "low-rank", "easy-cache")


def rows_for(*arguments: str) -> list[dict]:
    args = inference.parse(["--tiny", *arguments])
    kept: list[list[dict]] = []
    for at in inference.chosen_models(args):
        inference.measure_model(at, "fp32", args, kept.append)
    return kept[-1]


@pytest.fixture(scope="module", params=["SDXL", "Qwen-Image"])
def rows(request) -> dict[str, dict]:
    rows = rows_for("--model", request.param, "--profile", "--only", *METHODS)
    return {row["method"]: row for row in rows}


def test_every_method_is_measured(rows):
    assert rows.keys() == set(METHODS)
    for row in rows.values():
        assert "failed" not in row
        assert row["seconds_per_step"] > 0
        assert {"ratio_to_unguided", "ratio_quartiles", "ratio_to_cfg", "peak_bytes", "seconds_to_begin"} <= row.keys()


def test_an_adapter_has_its_share_of_a_step(rows):
    assert [rows[name]["evaluations_per_step"] for name in ("agd", "cfg")] == [1, 2]
    assert 0 < rows["agd"]["inside"] < 1
    assert 0 < rows["agd"]["kernels_inside"] < rows["agd"]["kernels_per_step"]
    assert rows["agd"]["floor_flops"] > 0
    assert "messages" not in rows["agd"]  # nothing keeps it from being at work
    assert "kernels_inside" not in rows["unguided"]


def test_low_rank_changes_are_in_the_weights(rows):
    assert rows["low-rank"]["flops_per_step"] == rows["unguided"]["flops_per_step"]


def test_steps_that_a_cache_leaves_out_are_apart(rows):
    assert rows["easy-cache"]["evaluations_per_step"] < 2
    assert rows["easy-cache"]["seconds_left_out"] < rows["easy-cache"]["seconds_evaluated"]


def test_a_method_that_fails_is_a_row_and_the_others_are_measured(monkeypatch):
    monkeypatch.setitem(inference.ADAPTERS, "agd", {"kind": "delta", "rank": 10**9})
    by_name = {row["method"]: row for row in rows_for("--model", "SD 1.5", "--only", "agd", "unguided", "nothing")}
    assert "rank" in by_name["agd"]["failed"]
    assert "There is no nothing here" in by_name["nothing"]["failed"]
    assert by_name["unguided"]["seconds_per_step"] > 0


def test_what_no_time_is_left_for_is_a_row():
    (row,) = rows_for("--model", "SD 1.5", "--only", "cfg", "--minutes", "1e-9")
    assert row["failed"] == "no time was left to begin it"


def trained(*arguments: str) -> list[dict]:
    return list(training.measured(training.parse(["--tiny", *arguments])))


@pytest.fixture(scope="module")
def trainings() -> list[dict]:
    return trained("--model", "Qwen-Image", "SD 1.5", "--memory-limit", "8")


def test_a_training_has_its_peak_beside_the_estimate(trainings):
    assert {row["model"] for row in trainings} == {"Qwen-Image", "SD 1.5"}
    for row in trainings:
        assert row["memory_limit"] == 8e9
        assert row["peak_bytes"] == pytest.approx(row["estimated_peak_bytes"], rel=0.3)
        assert row["seconds_per_sample"] > 0


def test_hours_are_those_of_the_default_batch(trainings):
    for row in trainings:
        assert (row["hours_of_default_run"] is not None) == (row["batch"] == 4)


def test_hours_of_a_run_follow_from_the_seconds_of_its_parts():
    case = training.MeasuredTraining("SD 1.5", 512, 512, "bf16", 4, steps=1)
    base = training.RandomBase("SD 1.5", tiny=True).patcher("fp32", torch.device("cpu")).model
    seconds = {"rollout": 1.0, "teacher": 3.0, "student": 4.0, "backward": 5.0, "optimiser": 1.0}
    # 1500 iterations, in every fourth of them the teacher.
    assert training.hours_of_default_run(case, describe_base(base), seconds) == pytest.approx(1500 * 11 / 3600)


def test_a_training_that_does_not_fit_is_a_row(monkeypatch):
    monkeypatch.setitem(training.CASES, "cpu", training.CASES["cpu"][:1])
    (row,) = trained("--memory-limit", "1e-6")
    assert "DoesNotFit" in row["failed"]
    assert (row["model"], row["memory_limit"]) == ("SD 1.5", 1000)


def test_under_a_limit_all_else_of_a_card_is_occupied(monkeypatch):
    occupied = []

    def empty(size, **where):
        occupied.append(size)
        return torch.zeros(0)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(79e9), int(80e9)))
    monkeypatch.setattr(torch, "empty", empty)
    card = torch.device("cuda", 0)
    assert training.memory_of(card, 11.5)[0] == 11.5e9
    assert occupied == [67.5e9]
    assert training.memory_of(card, None)[0] == training.memory_of(card, 100)[0] == 79e9
    assert occupied == [67.5e9, 0, 0]

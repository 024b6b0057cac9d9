"""Whole training runs on a base whose answers are known: stopped, gone on with, refused."""

import copy
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.guidance import RULES, GuidanceRule, per_row
from comfyui_agd.tests.support.analytic import (
    CONFIG,
    PROMPTS,
    AnalyticModel,
    Stopped,
    assert_close,
    assert_same,
    stop_after,
    weights,
)
from comfyui_agd.training import held_out
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.euler_sample import SampleSettings, sample
from comfyui_agd.training.finite import BaseNotFinite, Diverged, TargetNotFinite, base_prediction
from comfyui_agd.training.gap import (
    Evaluation,
    Trajectories,
    evaluate,
    follow_teacher,
)
from comfyui_agd.training.job import Job
from comfyui_agd.training.learning_rate import learning_rate
from comfyui_agd.training.plot import preview
from comfyui_agd.training.progress import PHASES
from comfyui_agd.training.run_folder import RunFolder, RunFolderError
from comfyui_agd.training.run_identity import DifferentRun, differences
from comfyui_agd.training.run_setup import RunOptions, split_prompts
from comfyui_agd.training.run_state import RunState
from comfyui_agd.training.solvers import solver_step
from comfyui_agd.training.trainer import Callbacks, train

VARIED = replace(CONFIG, aspect_ratios=("1:1", "2:1"), reuse=2, on_policy=0.5, on_policy_from=0.2)


def test_learning_rate_rises_then_falls_to_zero():
    config = TrainConfig(iterations=100, learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_held_out_prompts_are_kept_apart():
    prompts = [f"prompt {i}" for i in range(20)]
    training, held_out = split_prompts(prompts, TrainConfig(held_out=4))
    assert len(held_out) == 4
    assert sorted(training + held_out) == sorted(prompts)


def test_few_prompts_are_all_trained():
    assert split_prompts(["one", " ", "two"], TrainConfig(held_out=8))[1] == []


def test_no_prompts():
    with pytest.raises(ValueError, match="no prompts to train with"):
        split_prompts(["", "  "], TrainConfig())


# -- Stopped and gone on with


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted run."""
    return train(AnalyticModel(), PROMPTS, VARIED)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "a.run"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_complete(folder: Path, trained) -> None:
    """A line per iteration and one per measurement, in order, none twice."""
    lines = metrics(folder)
    assert [line["loss"] for line in lines if "loss" in line] == trained.losses
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, len(trained.losses) + 1))
    assert [(line["step"], line["score"]) for line in lines if "score" in line] == [
        (measured.step, measured.score) for measured in trained.history
    ]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)


@pytest.mark.parametrize("stop", range(1, 13))  # measured at 5, 10 and 12, saved at 5 and 10
def test_a_stopped_run_goes_on_to_the_same_result(folder, whole, stop):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, VARIED, stop_after(stop), options=RunOptions(folder=folder))
    assert (folder / f"state-{stop:06d}.pt").exists()
    resumed = train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder))
    assert_same(resumed, whole)
    assert_complete(folder, resumed)


def test_a_run_stopped_at_every_step_goes_on_to_the_same_result(folder, whole):
    for stop in range(1, 13):
        with pytest.raises(Stopped):
            train(AnalyticModel(), PROMPTS, VARIED, stop_after(stop), options=RunOptions(folder=folder))
    resumed = train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder))
    assert_same(resumed, whole)
    assert_complete(folder, resumed)


class Interrupted(AnalyticModel):
    """ComfyUI's own layers raise when a user interrupts, in the middle of an evaluation: the `at`-th here."""

    def __init__(self, at: int):
        super().__init__()
        self.at, self.calls = at, 0

    def denoise(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise Stopped
        return super().denoise(*args)


def test_a_run_stopped_inside_any_evaluation_goes_on_to_the_same_result(tmp_path, whole):
    """While a column is started, in the teacher, in the student with new and with seen states, while measuring."""
    counting, calls = Interrupted(-1), []
    train(counting, PROMPTS, VARIED, Callbacks(lambda p: calls.append(counting.calls) if p.phase == "train" else None))
    for at in (2, calls[2] + 1, calls[2] + 2, calls[7] + 1, calls[7] + 2, calls[5] + 30):
        folder = tmp_path / f"{at}.run"
        with pytest.raises(Stopped):
            train(Interrupted(at), PROMPTS, VARIED, options=RunOptions(folder=folder))
        resumed = train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder))
        assert_same(resumed, whole)
        assert_complete(folder, resumed)


def test_a_killed_run_goes_on_from_its_last_state(folder, whole, monkeypatch):
    """Killed, it saves nothing more; tests/comfy/test_killed.py does it to a real process."""

    def killed(progress):
        if progress.phase == "train" and progress.step == 8:
            monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("killed")))
            raise Stopped

    with pytest.raises((Stopped, RunFolderError)):
        train(AnalyticModel(), PROMPTS, VARIED, Callbacks(killed), options=RunOptions(folder=folder))
    monkeypatch.undo()
    assert [path.name for path in folder.glob("state-*")] == ["state-000005.pt"]
    steps = []
    resumed = train(
        AnalyticModel(),
        PROMPTS,
        VARIED,
        Callbacks(lambda p: steps.append((p.phase, p.step))),
        options=RunOptions(folder=folder),
    )
    assert next(step for phase, step in steps if phase == "train") == 5  # where it begins
    assert_same(resumed, whole)
    assert_complete(folder, resumed)


def test_a_damaged_newest_state_falls_back_to_the_one_before(folder, whole, caplog):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, VARIED, stop_after(8), options=RunOptions(folder=folder))
    newest = folder / "state-000008.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert_same(train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder)), whole)
    assert "state-000008.pt is damaged" in caplog.text


def test_as_many_states_are_kept_as_asked(folder):
    config = replace(CONFIG, save_every=2, keep_states=3)
    train(AnalyticModel(), PROMPTS, config, options=RunOptions(folder=folder))
    assert sorted(path.name for path in folder.glob("state-*")) == [f"state-{s:06d}.pt" for s in (8, 10, 12)]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"clip": 2.0}, "clip: 1.0 then, 2.0 now"),
        ({"evaluate_every": 2, "reuse": 3}, "evaluate_every: 5 then, 2 now; reuse: 2 then, 3 now"),
        ({"iterations": 20}, "iterations: 12 then, 20 now"),
    ],
)
def test_a_run_with_other_settings_is_refused(folder, other, told):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, VARIED, stop_after(3), options=RunOptions(folder=folder))
    before = metrics(folder)
    with pytest.raises(DifferentRun, match=told):
        train(AnalyticModel(), PROMPTS, replace(VARIED, **other), options=RunOptions(folder=folder))
    assert (folder / "state-000003.pt").exists()
    assert metrics(folder) == before


def test_a_run_with_other_prompts_or_another_base_is_refused(folder):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, CONFIG, stop_after(3), options=RunOptions(folder=folder))
    with pytest.raises(DifferentRun, match="prompts: 12 lines then, 11 lines now"):
        train(AnalyticModel(), PROMPTS[1:], CONFIG, options=RunOptions(folder=folder))
    with pytest.raises(DifferentRun, match="prompts: others now"):
        train(AnalyticModel(), PROMPTS[::-1], CONFIG, options=RunOptions(folder=folder))
    with pytest.raises(DifferentRun, match=r"negative: \[''\] then, \['a blot'\] now"):
        train(AnalyticModel(), PROMPTS, CONFIG, options=RunOptions(negative=["a blot"], folder=folder))
    with pytest.raises(DifferentRun, match=r"with other LoRAs or .*patches: {} then, {'patched_weights': 3} now"):
        train(AnalyticModel(base_patches={"patched_weights": 3}), PROMPTS, CONFIG, options=RunOptions(folder=folder))


def test_a_run_state_of_another_version_is_refused(folder):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, CONFIG, stop_after(3), options=RunOptions(folder=folder))
    (file,) = folder.glob("state-*")
    torch.save(torch.load(file, weights_only=True) | {"version": 1}, file)
    with pytest.raises(
        DifferentRun, match=r"another version of AGD.* delete its folder .* are of version 1, this AGD reads 2 and 3"
    ):
        train(AnalyticModel(), PROMPTS, CONFIG, options=RunOptions(folder=folder))


def test_a_run_that_was_saved_with_the_names_of_format_1_goes_on_to_the_same_result(folder, whole):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, VARIED, stop_after(7), options=RunOptions(folder=folder))
    file = max(folder.glob("state-*"))
    saved = torch.load(file, weights_only=True)

    def of_format_1(weights: dict) -> dict:
        return {key.replace("kind.", "sites.", 1): value for key, value in weights.items()}

    named = {key: of_format_1(saved[key]) for key in ("adapter", "average")}
    best = {**saved["best"], "weights": of_format_1(saved["best"]["weights"])}
    torch.save(saved | named | {"version": 2, "best": best}, file)
    assert_same(train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder)), whole)


def test_a_run_that_was_saved_before_there_were_some_settings_goes_on(folder, whole, caplog):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, VARIED, stop_after(7), options=RunOptions(folder=folder))
    file = max(folder.glob("state-*"))
    saved = torch.load(file, weights_only=True)
    for name in ("vector", "frames", "sigma_from", "sigma_to", "loras", "prediction", "noise_levels", "encoded_prompt"):
        del saved["identity"][name]
    del saved["by_sigma"], saved["shown"]
    torch.save(saved, file)
    assert_same(train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder)), whole)
    assert "didn't note the LoRAs' strengths, the noise schedule and the text encoder" in caplog.text
    with pytest.raises(DifferentRun, match=r"sigma_from: 0.0 then, 0.5 now"):
        train(AnalyticModel(), PROMPTS, replace(VARIED, sigma_from=0.5), options=RunOptions(folder=folder))


def test_a_run_that_was_saved_before_blocks_could_be_left_out_had_none_left_out(folder):
    every, second = (replace(CONFIG, kind="delta", hidden=8, attention_every=n) for n in (1, 2))
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, every, stop_after(7), options=RunOptions(folder=folder))
    file = max(folder.glob("state-*"))
    saved = torch.load(file, weights_only=True)
    del saved["identity"]["attention_every"]
    torch.save(saved, file)
    with pytest.raises(DifferentRun, match=r"attention_every: 1 then, 2 now"):
        train(AnalyticModel(), PROMPTS, second, options=RunOptions(folder=folder))
    train(AnalyticModel(), PROMPTS, every, options=RunOptions(folder=folder))


def test_how_a_run_is_kept_may_change_in_between(folder, whole):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, VARIED, stop_after(7), options=RunOptions(folder=folder))
    other = replace(VARIED, save_every=1, keep_states=1, preview_every=4)
    assert_same(train(AnalyticModel(), PROMPTS, other, options=RunOptions(folder=folder)), whole)
    assert sorted(path.name for path in (folder / "previews").iterdir()) == ["step-000008.png", "step-000012.png"]


def test_the_micro_batch_may_change_in_between(folder, whole):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, VARIED, stop_after(7), options=RunOptions(folder=folder))
    model = AnalyticModel()
    resumed = train(model, PROMPTS, replace(VARIED, micro_batch=1), options=RunOptions(folder=folder))
    assert_close(resumed, whole, 1e-3)


def test_differences_are_short():
    then = {"batch": 4, "prompts": ["a" * 80], "seed": 0}
    now = {"batch": 8, "prompts": ["b" * 80], "seed": 0, "reuse": 1}
    phrases = ["batch: 4 then, 8 now", "prompts: others now", "reuse: None then, 1 now"]
    assert list(differences(then, now).values()) == phrases


def test_what_another_device_computes_with_other_rounding_is_no_difference():
    levels, tokens = [14.6, 3.1, 0.03], [0.5, -2.0, 800.0, 1.0]
    then = {"noise_levels": levels, "encoded_prompt": tokens}
    rounded = {"noise_levels": [level * (1 + 1e-5) for level in levels], "encoded_prompt": [v * 1.02 for v in tokens]}
    assert differences(then, rounded) == {}
    others = {"noise_levels": [level * 1.01 for level in levels], "encoded_prompt": [0.6, -1.5, 800.0, 1.5]}
    assert [*differences(then, others)] == ["encoded_prompt", "noise_levels"]
    assert [*differences(then | {"prompts": ["a"]}, others | {"prompts": ["b"]})] == ["noise_levels", "prompts"]
    assert [*differences({"noise_levels": "damaged"}, {"noise_levels": levels})] == ["noise_levels"]


# -- What comes out


def scores(monkeypatch, by_measurement: list[float]) -> None:
    """Measurements find these scores, in their order."""
    left = list(by_measurement)

    def measured(*_):
        score = left.pop(0)
        return Evaluation({3.0: score}, {3.0: 0.5}, {3.0: [(1.0, score)]})

    monkeypatch.setattr("comfyui_agd.training.held_out.evaluate", measured)


def test_the_best_measured_adapter_comes_out_not_the_last(folder, monkeypatch):
    at_10 = train(AnalyticModel(), PROMPTS, replace(CONFIG, iterations=12, held_out=0), stop_after(99))
    scores(monkeypatch, [0.2, 0.1, 0.05])
    trained = train(AnalyticModel(), PROMPTS, CONFIG, options=RunOptions(folder=folder))
    assert trained.info.training["best_step"] == 5
    assert trained.info.training["iterations"] == 12
    assert trained.info.training["gap_closed"] == {"3": 0.2}
    assert not torch.equal(weights(trained), weights(at_10))
    info, saved = adapter_file.load(folder / "best.safetensors")
    assert info.training["step"] == 5
    for key, value in trained.adapter.state_dict().items():
        assert torch.equal(value, saved.state_dict()[key])


def test_the_best_adapter_survives_a_stop_after_it(folder, monkeypatch):
    scores(monkeypatch, [0.2, 0.1, 0.05] * 2)
    whole = train(AnalyticModel(), PROMPTS, CONFIG)
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, CONFIG, stop_after(7), options=RunOptions(folder=folder))
    resumed = train(AnalyticModel(), PROMPTS, CONFIG, options=RunOptions(folder=folder))
    assert resumed.info.training["best_step"] == 5
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    ("found", "patience", "ends", "best"),
    [
        ([0.1, 0.3, 0.2, 0.25, 0.9], 2, 8, 4),  # two measurements that were no better
        ([0.1, 0.3, 0.2, 0.4, 0.35], 2, 10, 8),  # a better one in between starts anew
        ([0.3, 0.2, 0.2, 0.2, 0.2], 0, 10, 2),  # never
    ],
)
def test_patience_ends_a_run_that_no_longer_improves(monkeypatch, found, patience, ends, best):
    scores(monkeypatch, found)
    config = replace(CONFIG, iterations=10, evaluate_every=2, patience=patience)
    trained = train(AnalyticModel(), PROMPTS, config)
    assert trained.info.training["iterations"] == len(trained.losses) == ends
    assert trained.info.training["best_step"] == best


def test_a_run_that_is_not_measured_gives_the_last_adapter():
    trained = train(AnalyticModel(), PROMPTS, replace(CONFIG, held_out=0))
    assert trained.history == []
    assert trained.evaluation is None
    assert trained.info.training["best_step"] == 12
    assert weights(trained).isfinite().all()


def test_held_out_prompts_of_ones_own_are_measured_on():
    seen = []
    trained = train(
        AnalyticModel(),
        PROMPTS,
        CONFIG,
        Callbacks(on_evaluation=lambda step, evaluation: seen.append((step, evaluation.score))),
        options=RunOptions(held_out=["a white circle"]),
    )
    assert trained.info.training["prompts"] == len(PROMPTS)
    assert trained.info.training["held_out_prompts"] == 1
    assert seen == [(measured.step, measured.score) for measured in trained.history]


def test_training_closes_the_gap():
    config = replace(CONFIG, iterations=60, evaluate_every=0, kind="cross_attention")  # a new one adds nothing
    trained = train(AnalyticModel(), PROMPTS, config)
    assert trained.losses[0] == pytest.approx(1.0)
    assert sum(trained.losses[-10:]) / 10 < 0.7
    assert all(value > 0.1 for value in trained.evaluation.gap_closed.values())


def test_progress_has_phases():
    """Each begins at none, before anything of it is done, and ends with all."""
    seen, counts = [], {"encode": 1, "teacher": 1, "measure": 3, "preview": 2}
    train(AnalyticModel(), PROMPTS, replace(CONFIG, preview_every=6), Callbacks(seen.append))
    assert {p.phase for p in seen} == {*counts, "train", "rollout"} < {*PHASES}
    for phase in ("rollout", *counts):
        steps = [(p.step, p.total) for p in seen if p.phase == phase]
        ended = [(0, 0), *(each for each in steps if each[0] == each[1])]
        assert [one for one, (step, _) in zip([(0, 0), *steps], steps, strict=False) if step == 0] == ended[:-1]
        assert all(step >= before for (before, _), (step, _) in itertools.pairwise(steps) if step > 0)
        assert len(ended) == 1 + counts.get(phase, len(ended) - 1)
    assert [p.step for p in seen if p.phase == "train"] == list(range(13))
    last = [p for p in seen if p.phase == "train"][-1]
    assert last.total == 12
    assert last.gap_closed is not None


@pytest.mark.parametrize("held_out", [1, 2])
def test_the_file_says_how_sure_its_gap_closed_is_where_several_prompts_were_measured(held_out):
    training = train(AnalyticModel(), PROMPTS, replace(CONFIG, held_out=held_out)).info.training
    assert training["gap_closed"].keys() == {"2.3", "5.2", "12"}
    errors = training.get("gap_closed_se", {})
    assert errors.keys() == (training["gap_closed"].keys() if held_out > 1 else set())
    assert all(0 < error < 1 for error in errors.values())


def test_steps_of_a_phase_are_evaluations_where_they_differ():
    """A preview by the teacher takes two where one with the adapter takes one; measured states come in rows."""
    model, seen = AnalyticModel(), []
    config = replace(CONFIG, preview_every=12, evaluate_every=0, on_policy=0.0)

    def remember(progress):
        seen.append((progress, sum(model.base_rows)))

    train(model, PROMPTS, config, Callbacks(remember))
    for phase in ("teacher", "measure", "preview"):
        reports = [(progress.step, rows) for progress, rows in seen if progress.phase == phase]
        per_step = 2 if phase == "teacher" else 1  # both branches of a state
        assert all(rows - reports[0][1] == per_step * step for step, rows in reports)


def test_no_more_columns_are_rolled_out_than_iterations_take():
    """A few iterations of a large pool of long trajectories need few evaluations before the first."""
    model, seen = AnalyticModel(), []
    config = replace(CONFIG, iterations=1, held_out=0, pool=8, steps_min=30, steps_max=30)
    trained = train(model, PROMPTS, config, Callbacks(seen.append))
    assert trained.info.training["teacher_evaluations"] <= 2 * config.batch * 30
    assert next(p.phase for p in seen if p.phase in ("train", "rollout")) == "train"  # ready before any rollout


def test_a_recording_costs_what_is_recorded_and_is_not_counted_twice(folder):
    """Stopped and gone on with."""
    recording = Job(AnalyticModel(), PROMPTS, CONFIG, folder.with_name("recording"), [""]).record(12, Callbacks())
    options = RunOptions(folder=folder, recording=recording)
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, CONFIG, stop_after(7), options=options)
    trained = train(AnalyticModel(), PROMPTS, CONFIG, options=options)
    assert trained.info.training["teacher_evaluations"] == recording.evaluations > 0


def test_what_is_measured_does_not_depend_on_how_many_rows_fit():
    model = AnalyticModel()
    prompts, negative = model.encode(PROMPTS[:5]), model.encode([""] * 5)
    run = train(model, PROMPTS, replace(CONFIG, iterations=2, held_out=0)).adapter
    found = [
        evaluate(model, run, follow_teacher(model, prompts, negative, Trajectories((2, 8, 8), [3.0], steps=5), batch))
        for batch in (1, 2, 5)
    ]
    for other in found[1:]:
        assert other.gap_closed[3.0] == pytest.approx(found[0].gap_closed[3.0], rel=1e-3)
        assert other.direction_cosine[3.0] == pytest.approx(found[0].direction_cosine[3.0], rel=1e-3)


def test_a_student_like_the_teacher_closes_the_gap_and_one_like_the_base_none(monkeypatch):
    model = AnalyticModel()
    prompts, negative = model.encode(PROMPTS[:3]), model.encode(["", "a blot", "red"])
    states = follow_teacher(model, prompts, negative, Trajectories((2, 8, 8), [2.0, 5.0], steps=6, keep=3))
    assert len(states) == 2 * 3

    def exact(adapter, x, sigma, positive, unwanted, omega):
        cond, uncond = model.denoise(x, sigma, positive), model.denoise(x, sigma, unwanted)
        return uncond + per_row(omega, x) * (cond - uncond)

    for student, closed in ((exact, 1.0), (lambda a, x, s, c, n, o: model.denoise(x, s, c), 0.0)):
        monkeypatch.setattr(model, "student", student)
        found = evaluate(model, None, states)
        assert list(found.gap_closed.values()) == pytest.approx([closed, closed], abs=1e-4)
        assert found.score == pytest.approx(closed, abs=1e-4)
        assert [sigma for sigma, _ in found.by_sigma[2.0]] == [s.sigma for s in states[:3]]
        assert json.loads(json.dumps(found.sigmas()))["2"][0][1] == pytest.approx(closed, abs=1e-4)


# -- Better teachers

BETTER = [name for name in RULES if name != "cfg"]


@pytest.mark.parametrize("name", BETTER)
def test_what_is_measured_and_shown_follows_the_teachers_rule(name):
    rule, model = GuidanceRule(name, sigma_min=0.5, threshold=3.0), AnalyticModel()
    prompt, negative = model.encode(PROMPTS[:1]), model.encode([""])
    states = follow_teacher(model, prompt, negative, Trajectories((2, 8, 8), [5.0], rule=rule, steps=6, seed=3))
    for state in states:
        sigma, omega = torch.tensor([state.sigma]), torch.tensor([5.0])
        uncond = model.denoise(state.x, sigma, negative)
        assert torch.equal(state.target, rule(state.x, sigma, state.cond, uncond, omega))
    for state, after in itertools.pairwise(states):
        sigma, sigma_next = torch.tensor([state.sigma]), torch.tensor([after.sigma])
        torch.testing.assert_close(after.x, solver_step(state.x, state.target, sigma, sigma_next))
    settings = [SampleSettings((2, 8, 8), 5.0, rule=r) for r in (rule, GuidanceRule())]
    own, plain = (sample(model, prompt[0], negative[0], each) for each in settings)
    assert (own - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", BETTER)
def test_a_run_learns_the_teacher_of_its_settings(name, monkeypatch):
    """What is measured, shown and said of it is of that teacher."""
    asked, shown = {"measured": set(), "shown": set()}, []

    def watch(kind, function):
        def watched(*args):
            asked[kind].add(args[3].rule)
            return function(*args)

        return watched

    def named(pictures):
        shown.append(list(pictures))
        return preview(pictures)

    monkeypatch.setattr(held_out, "follow_teacher", watch("measured", follow_teacher))
    monkeypatch.setattr(held_out, "sample", watch("shown", sample))
    monkeypatch.setattr(held_out, "preview", named)
    config = replace(VARIED, teacher=name, apg_threshold=3.0, preview_every=12)
    trained = train(AnalyticModel(), PROMPTS, config)
    assert config.rule in asked["measured"] & asked["shown"]
    assert asked["measured"] == {config.rule}
    assert [title.split()[0].lower() for title in shown[0]] == [name.split("_")[0], "agd"]
    assert trained.info.training["config"]["teacher"] == name
    assert f'"teacher": "{name}"' in adapter_file.describe(trained.info, "a.safetensors")
    assert trained.losses != train(AnalyticModel(), PROMPTS, replace(config, teacher="cfg")).losses


def test_a_run_with_another_teacher_is_refused(folder):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, CONFIG, stop_after(3), options=RunOptions(folder=folder))
    other = replace(CONFIG, teacher="apg", apg_eta=0.5)
    with pytest.raises(DifferentRun, match=r"apg_eta: 0.0 then, 0.5 now; teacher: 'cfg' then, 'apg' now"):
        train(AnalyticModel(), PROMPTS, other, options=RunOptions(folder=folder))


def test_an_adapter_is_measured_at_the_noise_levels_that_are_guided_and_blamed_for_the_others(monkeypatch):
    model, rule = AnalyticModel(), GuidanceRule("interval", sigma_min=1.0, sigma_max=5.0)
    prompts, negative = model.encode(PROMPTS[:2]), model.encode(["", "a blot"])
    states = follow_teacher(model, prompts, negative, Trajectories((2, 8, 8), [5.0], rule=rule, steps=6))
    inside = [state.sigma for state in states if 1.0 < state.sigma <= 5.0]
    assert 0 < len(inside) < len(states)

    def student(adapter, x, sigma, positive, unwanted, omega):
        cond, uncond = model.denoise(x, sigma, positive), model.denoise(x, sigma, unwanted)
        return (rule if adapter == "exact" else GuidanceRule())(x, sigma, cond, uncond, omega)

    monkeypatch.setattr(model, "student", student)
    exact, everywhere = (evaluate(model, adapter, states) for adapter in ("exact", "cfg"))
    assert exact.score == pytest.approx(1.0, abs=1e-5)
    assert exact.direction_cosine[5.0] == pytest.approx(1.0, abs=1e-5)
    assert everywhere.score < 0.9
    for found in (exact, everywhere):
        assert [sigma for sigma, _ in found.by_sigma[5.0]] == inside
        assert [value for _, value in found.by_sigma[5.0]] == pytest.approx([1.0] * len(inside), abs=1e-5)


def test_batches_that_are_not_guided_at_all_do_no_harm():
    """With one state a step, many are outside of the interval."""
    config = replace(CONFIG, teacher="interval", batch=1, iterations=40, held_out=0, interval_sigma_min=1.0)
    losses = train(AnalyticModel(), PROMPTS, config).losses
    assert 5 < losses.count(0.0) < 35
    assert max(losses) < 3


def test_an_interval_without_any_noise_level_is_refused_before_any_evaluation():
    model, config = AnalyticModel(), replace(CONFIG, interval_sigma_min=20.0, interval_sigma_max=30.0)
    with pytest.raises(ValueError, match=r"levels go from 0.1 to 10, the interval of guidance from 20 to 30; set"):
        train(model, PROMPTS, replace(config, teacher="interval"))
    assert model.base_rows == []
    train(model, PROMPTS, replace(config, iterations=1, held_out=0))  # another teacher's run


# -- What can't work


def test_a_loss_that_is_not_finite_stops_the_run(folder, monkeypatch):
    """Nothing of the bad step stays: with a model that is well again, the run goes on to the same result."""
    model, real = AnalyticModel(), AnalyticModel.student

    def student(*args):
        out = real(model, *args)
        return out * float("nan") if len(model.student_rows) == 3 else out

    monkeypatch.setattr(model, "student", student)
    unmeasured = replace(CONFIG, held_out=0)
    told = (
        r"loss became nan at iteration 3\. Train again with a smaller learning rate than 0\.003: the same output starts"
    )
    with pytest.raises(Diverged, match=told):
        train(model, PROMPTS, unmeasured, options=RunOptions(folder=folder))
    assert_same(
        train(AnalyticModel(), PROMPTS, unmeasured, options=RunOptions(folder=folder)),
        train(AnalyticModel(), PROMPTS, unmeasured),
    )


LONG = replace(CONFIG, held_out=0, iterations=80, save_every=10, keep_states=9)


def exploding(monkeypatch, at: int, by: float = 1e3) -> AnalyticModel:
    """Its student is far off from that iteration on."""
    model, real = AnalyticModel(), AnalyticModel.student

    def student(adapter, x, *rest):
        out = real(model, adapter, x, *rest)
        return out + by * x.abs().max() if len(model.student_rows) >= at else out

    monkeypatch.setattr(model, "student", student)
    return model


@pytest.mark.parametrize(("at", "by", "kept"), [(45, 1e3, 30), (45, float("nan"), 20), (5, float("nan"), None)])
def test_the_advice_after_a_divergence_can_be_followed_with_the_same_output(folder, monkeypatch, caplog, at, by, kept):
    """The states of the iterations in which it was found lead nowhere; an older one does, with another rate."""
    told = f"the same output goes on from step {kept}\\." if kept else "the same output starts again\\."
    with pytest.raises(Diverged, match=f"smaller learning rate than 0.003: {told}"):
        train(exploding(monkeypatch, at, by), PROMPTS, LONG, options=RunOptions(folder=folder))
    steps = []
    slower, watch = replace(LONG, learning_rate=1e-4), Callbacks(lambda p: steps.append((p.phase, p.step)))
    trained = train(AnalyticModel(), PROMPTS, slower, watch, options=RunOptions(folder=folder))
    assert next(step for phase, step in steps if phase == "train") == (kept or 0)
    assert len(trained.losses) == LONG.iterations
    assert ("learning_rate: 0.003 then, 0.0001 now" in caplog.text) == bool(kept)
    assert metrics(folder)[kept or 0]["learning_rate"] < 1e-4


class Broken(AnalyticModel):
    """A base whose `at`-th evaluation is `value` in its second row, as fp16 computes where it overflows."""

    computes_in = torch.float16

    def __init__(self, at: int, value: float = float("nan")):
        super().__init__()
        self.at, self.value = at, value

    def denoise(self, x, sigma, prompts):
        out = super().denoise(x, sigma, prompts)
        if len(self.base_rows) == self.at:
            out[min(1, len(out) - 1), 0, 0, 0] = self.value
        return out


@pytest.mark.parametrize(("value", "named"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
@pytest.mark.parametrize("phase", ["rollout", "train", "teacher", "preview"])
def test_a_base_that_is_not_finite_is_named_and_the_same_output_goes_on_in_another_precision(
    tmp_path, value, named, phase
):
    config = replace(CONFIG, preview_every=5)
    at = {"rollout": 2}
    counting = AnalyticModel()

    def count(progress):
        if progress.phase != "train" or progress.step > 0:
            at.setdefault(progress.phase, len(counting.base_rows) + 1)

    train(counting, PROMPTS, config, Callbacks(count, on_preview=lambda *_: None))
    told = (
        rf"^The model itself, without any adapter, predicts {named} for the prompt '.*' at noise level [\d.]+, "
        r"computed in float16: .*--precision bf16.*--base-dtype"
    )
    options = RunOptions(folder=tmp_path / "a.run")
    with pytest.raises(BaseNotFinite, match=told):
        train(Broken(at[phase], value), PROMPTS, config, options=options)
    saved = RunFolder(options.folder).load_run_state()
    assert (saved is None) == (phase == "rollout")
    resumed = train(AnalyticModel(), PROMPTS, replace(config, precision="bf16"), options=options)
    assert_same(
        replace(resumed, info=train(AnalyticModel(), PROMPTS, config).info), train(AnalyticModel(), PROMPTS, config)
    )


def test_the_prompt_that_is_named_is_the_rows_own_short_and_on_one_line():
    model = Broken(1)
    prompts = ["fine", "a prompt\nof two lines, and with much " + "more " * 50]
    with pytest.raises(
        BaseNotFinite, match=r"for the prompt 'a prompt of two lines, and with much more .{,30} \.\.\.' at"
    ):
        base_prediction(model, torch.ones(2, 2, 8, 8), torch.ones(2), model.encode(prompts))


def test_a_base_that_computes_in_more_than_fp16_gets_other_advice():
    model = Broken(1)
    model.computes_in = torch.bfloat16
    with pytest.raises(BaseNotFinite, match=r"computed in bfloat16: its file or one of its LoRAs may be damaged"):
        base_prediction(model, torch.ones(1, 2, 8, 8), torch.ones(1), model.encode(["a star"]))


def test_a_teacher_that_is_not_finite_is_not_taken_for_the_adapter(monkeypatch):
    monkeypatch.setattr(GuidanceRule, "__call__", lambda self, x, sigma, cond, *_: cond / 0)
    with pytest.raises(
        TargetNotFinite, match=r"The teacher's guidance \(cfg\) is NaN or infinite at iteration 1, though"
    ):
        train(AnalyticModel(), PROMPTS, replace(CONFIG, held_out=0, pool=1, steps_min=1, steps_max=1))


def test_a_gradient_that_is_not_finite_moves_no_weight(folder, monkeypatch):
    """The loss is fine, as it is where half precision overflows in the backward pass alone."""
    model, real = AnalyticModel(), AnalyticModel.student

    def student(*args):
        out = real(model, *args)
        if len(model.student_rows) == 4:
            out.register_hook(lambda gradient: gradient * float("inf"))
        return out

    monkeypatch.setattr(model, "student", student)
    with pytest.raises(Diverged, match=r"the gradient became (nan|inf) at iteration 4"):
        train(model, PROMPTS, replace(CONFIG, held_out=0), options=RunOptions(folder=folder))


def test_a_measurement_that_is_not_finite_is_a_divergence(folder, monkeypatch):
    scores(monkeypatch, [0.1, float("nan")])
    with pytest.raises(Diverged, match="what the adapter closes of the gap is nan at step 10"):
        train(AnalyticModel(), PROMPTS, CONFIG, options=RunOptions(folder=folder))


def with_nan(saved: dict, part: str) -> dict:
    """A state as saved, with a NaN in one of its parts."""
    places = {
        "adapter": saved["adapter"],
        "average": saved["average"],
        "optimiser": saved["optimiser"]["state"][0],
        "pool": {key: value for key, value in saved["lanes"].items() if key == "x0"},
        "best": saved["best"]["weights"],
    }
    next(value for value in places[part].values() if value.is_floating_point() and value.ndim).view(-1)[0] = float(
        "nan"
    )
    return saved


@pytest.mark.parametrize("part", ["adapter", "average", "optimiser", "pool", "best"])
def test_a_state_that_is_not_finite_is_never_saved_and_never_gone_on_from(folder, whole, caplog, monkeypatch, part):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, VARIED, stop_after(8), options=RunOptions(folder=folder))
    newest = folder / "state-000008.pt"
    torch.save(with_nan(torch.load(newest, weights_only=True), part), newest)
    assert_same(train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder)), whole)
    assert re.search(r"state-000008.pt is damaged \(.* holds NaN or infinity\); an older state is used", caplog.text)

    real = RunState.state_dict
    monkeypatch.setattr(RunState, "state_dict", lambda *args: with_nan(copy.deepcopy(real(*args)), part))
    with pytest.raises(Diverged, match=r"of step 12 holds NaN or infinity\. Train again"):
        train(AnalyticModel(), PROMPTS, VARIED, stop_after(12), options=RunOptions(folder=folder))
    assert not (folder / "state-000012.pt").exists()


def test_a_learning_rate_far_too_large_stops_the_run():
    config = replace(CONFIG, held_out=0, learning_rate=1.0, iterations=100, ema=0.0, warmup=0.0)
    with pytest.raises(FloatingPointError, match=r"(loss|gradient) (exploded|became).* smaller learning rate than 1"):
        train(AnalyticModel(), PROMPTS, config)


def test_an_exploding_loss_says_how_far_and_a_single_peak_is_nothing(monkeypatch):
    def run(peak: slice, iterations: int) -> list[float]:
        model = AnalyticModel()
        real = model.student

        def student(adapter, x, *rest):
            out = real(adapter, x, *rest)
            return out + 1e3 * x.abs().max() if len(model.student_rows) in range(100)[peak] else out

        monkeypatch.setattr(model, "student", student)
        return train(model, PROMPTS, replace(CONFIG, held_out=0, iterations=iterations)).losses

    assert max(run(slice(10, 11), 30)) > 1000  # one batch of many
    with pytest.raises(FloatingPointError, match=r"exploded, at iteration 20 it is \d+ times that of no adapter"):
        run(slice(5, None), 60)


def test_a_full_disk_stops_the_run_with_its_last_state_kept(folder, monkeypatch, whole):
    real, saved = torch.save, []

    def save(state, path):
        if len(saved) == 1:
            raise OSError(28, "No space left on device")
        saved.append(path)
        real(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(RunFolderError, match=r"state of step 10 could not be saved.*No space left.*make room"):
            train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder))
    assert [path.name for path in folder.glob("*state*")] == ["state-000005.pt"]
    resumed = train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder))
    assert_same(resumed, whole)
    assert_complete(folder, resumed)


def test_a_folder_that_can_not_be_one_is_refused_before_any_evaluation(folder):
    folder.write_text("a file")
    model = AnalyticModel()
    with pytest.raises(RunFolderError, match="can't be written to"):
        train(model, PROMPTS, CONFIG, options=RunOptions(folder=folder))
    assert model.base_rows == []


def test_an_unknown_scheduler_is_refused_before_any_evaluation():
    model = AnalyticModel()
    with pytest.raises(ValueError, match="no scheduler 'cosy'"):
        train(model, PROMPTS, replace(CONFIG, schedulers=("normal", "cosy")))
    assert model.base_rows == []


def test_a_callback_may_fail_without_harm(folder, whole):
    """What a caller's own window raises stops the run, and the run goes on."""

    def broken(progress):
        raise RuntimeError("the window was closed")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="window was closed"):
            train(AnalyticModel(), PROMPTS, VARIED, Callbacks(broken), options=RunOptions(folder=folder))
    assert_same(train(AnalyticModel(), PROMPTS, VARIED, options=RunOptions(folder=folder)), whole)

"""Recordings: what online training would visit, to train from again and again."""

import contextlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comfyui_agd.agd_core.guidance import RULES, GuidanceRule, cfg
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel, Stopped, assert_same, stop_after, weights
from comfyui_agd.tests.support.damaged import damaged_description
from comfyui_agd.tests.unit.test_pool import pool_of
from comfyui_agd.training import recording as module
from comfyui_agd.training.finite import TargetNotFinite
from comfyui_agd.training.job import Job
from comfyui_agd.training.options import SettingsError
from comfyui_agd.training.plan import DoesNotFit
from comfyui_agd.training.pool import TrajectoryPool
from comfyui_agd.training.progress import Progress
from comfyui_agd.training.recording import Recording, RecordingError, size_in_bytes
from comfyui_agd.training.run_identity import DifferentRun
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Callbacks, train


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(module, "_SHARD_BATCHES", 4)


def make(folder: Path, config=CONFIG, batches: int = CONFIG.iterations, progress=lambda done, total: None) -> Recording:
    """`progress`: of the batches."""

    def of_phase(told: Progress) -> None:
        if told.phase == "record":
            progress(told.step, told.total)

    return Job(AnalyticModel(), PROMPTS, config, folder, [""]).record(batches, Callbacks(of_phase))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SHARD_BATCHES", 4)
        make(folder)
    return folder


@pytest.fixture
def folder(recorded, tmp_path) -> Path:
    """A copy, to damage."""
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def checksums(recording: Recording) -> list[str]:
    return [shard["sha256"] for shard in recording.shards]


def test_training_from_a_recording_is_online_training(recorded, monkeypatch):
    """The same states in the same order, to the accuracy of fp16."""
    seen, real = {"online": [], "recorded": []}, module.RecordedBatches.next

    def watch(kind, next_):
        def next_and_keep(self, *args):
            batch = next_(self, *args)
            seen[kind].append(batch)
            return batch

        return next_and_keep

    monkeypatch.setattr(TrajectoryPool, "next", watch("online", TrajectoryPool.next))
    monkeypatch.setattr(module.RecordedBatches, "next", watch("recorded", real))
    online = train(AnalyticModel(), PROMPTS, CONFIG)
    model = AnalyticModel()
    trained = train(model, PROMPTS, CONFIG, options=RunOptions(recording=Recording.open(recorded)))
    assert len(seen["online"]) == len(seen["recorded"]) == CONFIG.iterations
    for one, other in zip(seen["online"], seen["recorded"], strict=True):
        for name in ("sigma", "omega", "positive", "negative"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        for name in ("x", "cond", "uncond"):
            assert torch.equal(getattr(one, name).half(), getattr(other, name).half())
    assert trained.losses == pytest.approx(online.losses, rel=2e-2)
    torch.testing.assert_close(weights(trained), weights(online), rtol=5e-2, atol=1e-2)
    assert trained.info.training["teacher_evaluations"] == online.info.training["teacher_evaluations"]


def test_a_recording_costs_no_teacher_but_to_measure(recorded):
    model = AnalyticModel()
    train(model, PROMPTS, replace(CONFIG, held_out=0), options=RunOptions(recording=Recording.open(recorded)))
    assert len(model.base_rows) == len(model.student_rows)  # the student's own evaluations


def test_further_passes_are_shuffled_with_other_omegas(recorded):
    batches = Recording.open(recorded).source(CONFIG, range(CONFIG.batch))
    count = CONFIG.iterations
    passes = [[batches.next(step) for step in range(i * count, (i + 1) * count)] for i in range(3)]
    for later in passes[1:]:
        places = [next(i for i, b in enumerate(passes[0]) if torch.equal(b.x, other.x)) for other in later]
        assert sorted(places) == list(range(count))
        assert places != sorted(places)
        for place, batch in zip(places, later, strict=True):
            assert not torch.equal(batch.omega, passes[0][place].omega)
            torch.testing.assert_close(batch.target, cfg(batch.cond, batch.uncond, batch.omega))
    assert [b.omega.tolist() for b in passes[1]] != [b.omega.tolist() for b in passes[2]]


def test_a_rank_gets_its_lanes_of_a_recording(recorded):
    whole, part = (Recording.open(recorded).source(CONFIG, rows) for rows in (range(4), range(2, 4)))
    for step in (0, 11, 12, 30):
        assert torch.equal(whole.next(step).x[2:], part.next(step).x)
        assert torch.equal(whole.next(step).omega[2:], part.next(step).omega)


def test_training_from_a_recording_can_be_stopped(recorded, tmp_path):
    config = replace(CONFIG, iterations=30)
    whole = train(AnalyticModel(), PROMPTS, config, options=RunOptions(recording=Recording.open(recorded)))
    for stop in (3, 12, 20):
        opened = Recording.open(recorded)
        with pytest.raises(Stopped):
            train(
                AnalyticModel(),
                PROMPTS,
                config,
                stop_after(stop),
                options=RunOptions(folder=tmp_path / "a.run", recording=opened),
            )
    resumed = train(
        AnalyticModel(),
        PROMPTS,
        config,
        options=RunOptions(folder=tmp_path / "a.run", recording=Recording.open(recorded)),
    )
    assert_same(resumed, whole)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9])
def test_an_interrupted_recording_goes_on_to_the_same_shards(recorded, tmp_path, stop):
    def interrupt(done, total):
        if done == stop:
            raise Stopped

    with pytest.raises(Stopped):
        make(tmp_path / "r", progress=interrupt)
    done = []
    resumed = make(tmp_path / "r", progress=lambda d, total: done.append(d))
    assert done[0] == (stop - 1 if stop % 4 == 0 else stop) // 4 * 4  # from the last whole shard on
    whole = Recording.open(recorded)
    assert checksums(resumed) == checksums(Recording.open(tmp_path / "r")) == checksums(whole)
    assert resumed.evaluations == whole.evaluations
    assert resumed.batches == CONFIG.iterations
    assert list((tmp_path / "r").glob(".*.part")) == []


def test_a_recording_can_be_made_longer(recorded, tmp_path):
    make(tmp_path / "r", batches=8)
    longer = make(tmp_path / "r", batches=12)
    assert checksums(longer) == checksums(Recording.open(recorded))
    assert checksums(make(tmp_path / "r", batches=4)) == checksums(longer)


def test_killed_between_a_shard_and_its_index(folder, recorded):
    """The pool's state is what counts; the index follows it."""
    (folder / ".shard-00003.safetensors.abc.part").write_bytes(b"half")
    old = make(folder.parent / "short", batches=8).folder / "recording.json"
    shutil.copy(old, folder / "recording.json")
    assert Recording.open(folder).batches == 8
    assert make(folder).batches == Recording.open(folder).batches == 12
    assert list(folder.glob(".*.part")) == []


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_cut_or_missing_shard_is_refused(folder, size):
    shard = folder / "shard-00001.safetensors"
    if size < 0:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(RecordingError, match=r"shard-00001\.safetensors has [\d,]+ bytes instead of [\d,]+; delete"):
        Recording.open(folder)


def test_a_damaged_shard_is_refused_before_its_states_are_trained_with(folder):
    shard = folder / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RecordingError, match=r"shard-00001\.safetensors is damaged \(its checksum differs\)"):
        train(
            AnalyticModel(),
            PROMPTS,
            CONFIG,
            stop_after(100),
            options=RunOptions(recording=Recording.open(folder), folder=folder.parent / "a.run"),
        )
    assert len((folder.parent / "a.run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_what_is_no_recording_is_refused(folder, tmp_path):
    with pytest.raises(RecordingError, match="is no recording"):
        Recording.open(tmp_path)
    index = folder / "recording.json"
    index.write_text(index.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(RecordingError, match="recording format 9, this version of AGD reads 1"):
        Recording.open(folder)
    index.write_text(index.read_text()[:50])
    with pytest.raises(RecordingError, match="is no recording"):
        Recording.open(folder)


def test_a_damaged_index_is_taken_or_refused(folder):
    """A recording may come from a stranger: any other error than these is the test's failure."""
    index, rng, taken = folder / "recording.json", random.Random(0), 0
    whole = index.read_text()
    for _ in range(400):
        index.write_text(damaged_description(whole, rng))
        with contextlib.suppress(RecordingError, SettingsError):
            found = Recording.open(folder)
            assert found.config(CONFIG).rule
            assert found.checksum()
            assert found.batches > 0
            assert all((folder / shard["file"]).parent == folder for shard in found.shards)
            taken += 1
    assert 0 < taken < 200


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "shard-00000.safetensors/x", "shard-0.pt"])
def test_a_shard_is_beside_the_index(folder, file):
    index = folder / "recording.json"
    data = json.loads(index.read_text())
    data["shards"][0]["file"] = file
    index.write_text(json.dumps(data))
    with pytest.raises(RecordingError, match=r"file is '.*', but must be a text such as shard-00000.safetensors"):
        Recording.open(folder)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"omega_max": 9.0}, {"solvers": ("euler",)}, {"teacher": "apg"}, {"rescale_phi": 0.5}]
)
def test_other_settings_do_not_go_on_with_a_recording(folder, other):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(RecordingError, match=f"is a recording with other settings \\({next(iter(other))}\\)"):
        make(folder, replace(CONFIG, **other))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_settings_that_change_nothing_in_a_recording_may_differ(folder, recorded):
    assert checksums(make(folder, replace(CONFIG, learning_rate=1.0, iterations=99))) == checksums(
        Recording.open(recorded)
    )


def test_a_damaged_pool_is_refused(folder):
    (folder / "pool.state").write_bytes(b"half a state")
    with pytest.raises(RecordingError, match=r"pool\.state is damaged; delete .* to record anew"):
        make(folder)


def test_a_full_disk_keeps_whole_shards(folder, recorded, tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    shard = (recorded / "shard-00000.safetensors").stat().st_size
    pool = (recorded / "pool.state").stat().st_size
    wide = replace(CONFIG, width=128, height=128)
    make(tmp_path / "r", wide, batches=4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(shard, pool), before[1]))
    try:
        with pytest.raises(
            RecordingError, match=r"same command goes on.*shard-00001\.safetensors could not be .*; make room"
        ):
            make(tmp_path / "r", wide)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Recording.open(tmp_path / "r").batches == 4
    assert make(tmp_path / "r", wide).batches == 12


def test_the_settings_of_a_recording_come_from_it(recorded):
    asked = replace(CONFIG, batch=8, seed=5, learning_rate=0.5, aspect_ratios=("2:1",), frames=4, iterations=7)
    recording = Recording.open(recorded)
    assert recording.config(asked) == replace(CONFIG, learning_rate=0.5, iterations=7)
    del recording.identity["frames"]  # of one from before there were several
    assert recording.config(asked) == replace(CONFIG, learning_rate=0.5, iterations=7)


@pytest.mark.parametrize("teacher", [name for name in RULES if name != "cfg"])
def test_any_teacher_can_be_learnt_from_a_recording(recorded, teacher):
    """Both predictions are stored. Only the trajectories are those of the teacher that was recorded."""
    recording = Recording.open(recorded)
    config = recording.config(replace(CONFIG, teacher=teacher, apg_threshold=3.0))
    assert config.teacher == teacher
    batches = recording.source(config, range(CONFIG.batch))
    for step in (0, 11, 12, 30):
        batch = batches.next(step)
        assert torch.equal(batch.target, config.rule(batch.x, batch.sigma, batch.cond, batch.uncond, batch.omega))
    trained = train(AnalyticModel(), PROMPTS, config, options=RunOptions(recording=recording))
    assert trained.info.training["config"]["teacher"] == teacher
    assert trained.losses != train(AnalyticModel(), PROMPTS, CONFIG, options=RunOptions(recording=recording)).losses


def test_a_recording_follows_its_teacher(recorded, tmp_path):
    assert checksums(make(tmp_path / "r", replace(CONFIG, teacher="rescale"))) != checksums(Recording.open(recorded))


def test_a_recording_is_part_of_what_a_run_is(recorded, tmp_path):
    with pytest.raises(Stopped):
        train(AnalyticModel(), PROMPTS, CONFIG, stop_after(3), options=RunOptions(folder=tmp_path / "a.run"))
    with pytest.raises(DifferentRun, match="recording: '' then"):
        train(
            AnalyticModel(),
            PROMPTS,
            CONFIG,
            options=RunOptions(folder=tmp_path / "a.run", recording=Recording.open(recorded)),
        )


def test_a_recording_can_not_follow_the_student(recorded):
    with pytest.raises(
        ValueError,
        match="A recording has the teacher's steps only, none of the adapter's: train from one with on_policy 0",
    ):
        train(
            AnalyticModel(),
            PROMPTS,
            replace(CONFIG, on_policy=0.5),
            options=RunOptions(recording=Recording.open(recorded)),
        )


@pytest.mark.parametrize("ratios", [(), ("1:1", "2:1")])
def test_the_size_is_told_before(tmp_path, monkeypatch, ratios):
    """Of pictures of 512 pixels; those of the other tests are so small that names weigh more than they."""
    monkeypatch.undo()  # shards of a usual length
    config = replace(CONFIG, width=512, height=512, aspect_ratios=ratios, steps_min=2, steps_max=2)
    make(tmp_path / "r", config, batches=40)
    size = sum(path.stat().st_size for path in (tmp_path / "r").iterdir())
    assert size_in_bytes(AnalyticModel(), config, 40) == pytest.approx(size, rel=0.05)


def test_a_recording_of_some_noise_levels_is_trained_from_and_measured_at_them(tmp_path):
    recording = make(tmp_path / "range", replace(CONFIG, sigma_from=2.0, sigma_to=8.0), batches=4)
    config = Recording.open(recording.folder).config(CONFIG)
    assert (config.sigma_from, config.sigma_to) == (2.0, 8.0)
    trained = train(AnalyticModel(), PROMPTS, config, options=RunOptions(recording=recording))
    levels = [sigma for pairs in trained.evaluation.by_sigma.values() for sigma, _ in pairs]
    assert levels
    assert all(2 <= sigma < 8 for sigma in levels)


def test_a_recording_of_all_noise_levels_is_learnt_at_all(recorded):
    assert Recording.open(recorded).config(replace(CONFIG, sigma_from=2.0)).learns_everywhere


def test_what_is_recorded_is_not_kept_to_come_again(tmp_path):
    """It would be written again with every shard. Nor is what an earlier version kept."""
    sizes = []
    for reuse in (1, 4):
        make(tmp_path / f"{reuse}", replace(CONFIG, reuse=reuse))
        sizes.append((tmp_path / f"{reuse}" / "pool.state").stat().st_size)
    assert sizes[0] == sizes[1]
    pool = pool_of(replace(CONFIG, reuse=2))
    pool.advance(batch := pool.next(0), batch.target, 0.0)
    again = pool_of(replace(CONFIG, reuse=1))
    again.load_state_dict(*pool.state_dict())
    assert again.visited == []


def test_the_guidance_scales_of_later_passes_follow_the_seed_and_never_come_again(recorded):
    def drawn(step: int, seed: int = 0, rows: range = range(4)) -> list[float]:
        return Recording.open(recorded).source(replace(CONFIG, seed=seed), rows).next(step).omega.tolist()

    first = CONFIG.iterations
    assert drawn(first) == drawn(first)
    assert len(set(drawn(first))) == 4
    assert drawn(first, rows=range(2, 4)) == drawn(first)[2:]
    for other in (drawn(first, seed=1), drawn(first + 4096), drawn(first + 1)):
        assert not {*other} & {*drawn(first)}
    assert drawn(3, seed=1) == drawn(3)  # as recorded


def test_a_card_has_room_for_what_is_recorded(tmp_path):
    """A base of 10 GB, and 1 GB for each latent that is evaluated at once."""
    sessions = []

    class OnACard(AnalyticModel):
        def available(self):
            return 15 * 10**9

        def base_bytes(self):
            return 10 * 10**9

        def trace_base(self, shape, rows, prompt):
            return SimpleNamespace(peak_bytes=rows * 10**9)

        def session(self, **settings):
            sessions.append(settings)
            return super().session()

    model = OnACard()
    Job(model, PROMPTS, CONFIG, tmp_path / "recording", [""]).record(1, Callbacks())
    assert 4e9 < sessions[0]["memory"] < 4.5e9
    assert max(model.base_rows) == 4


def test_prompts_that_system_memory_has_no_place_for_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(AnalyticModel, "system_available", lambda model: 1000)
    with pytest.raises(DoesNotFit, match="The encoded prompts take"):
        make(tmp_path / "recording")


@pytest.mark.parametrize("most", [0, 40])
def test_guidance_that_is_no_number_is_not_the_bases_fault(tmp_path, monkeypatch, most):
    """At first, where trajectories are brought to their phases, or after so many evaluations of the teacher."""
    asked, real = [], GuidanceRule.__call__

    def overflowing(rule, x, *rest):
        asked.append(rule)
        return real(rule, x, *rest) + (torch.inf if len(asked) > most else 0)

    monkeypatch.setattr(GuidanceRule, "__call__", overflowing)
    with pytest.raises(TargetNotFinite, match=r"^The teacher's guidance \(cfg\) is NaN or infinite, though"):
        make(tmp_path / "recording", batches=100)

"""A training job: what it refuses, writes, and reports."""

import errno
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.atomic import NotWritten, write_text
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel, Stopped, assert_same, stop_after
from comfyui_agd.training.job import Job, JobError
from comfyui_agd.training.trainer import Callbacks


@pytest.mark.parametrize(("held_out", "first"), [(2, r"Gap closed -?\d+%, mine\.safetensors\."), (0, "Saved mine.*")])
def test_a_report_begins_with_the_result(tmp_path, held_out, first):
    config = replace(CONFIG, iterations=2, evaluate_every=0, held_out=held_out)
    job = Job(AnalyticModel(), PROMPTS, config, tmp_path / "mine.safetensors")
    report = job.report(job.run(Callbacks(), None, {}))
    assert re.fullmatch(first, report.splitlines()[0])
    assert (tmp_path / "mine.run" / "report.txt").read_text() == report


def test_remains_of_a_killed_write_of_the_output_are_removed_and_others_stay(tmp_path):
    ours, others = tmp_path / ".mine.safetensors.abc.part", tmp_path / ".mine.safetensors2.safetensors.abc.part"
    for path in (ours, others):
        path.write_bytes(b"half")
    job = Job(AnalyticModel(), PROMPTS, replace(CONFIG, iterations=1, held_out=0), tmp_path / "mine.safetensors")
    job.run(Callbacks(), None, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "mine.run", "mine.safetensors"]


def test_a_final_write_that_fails_keeps_the_states_and_the_same_job_goes_on(tmp_path, monkeypatch):
    job = Job(AnalyticModel(), PROMPTS, replace(CONFIG, iterations=7, held_out=0), tmp_path / "mine.safetensors")
    with monkeypatch.context() as patch:

        def save_half(weights, path, metadata):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(28, "No space left on device")

        patch.setattr(adapter_file, "save_file", save_half)
        told = (
            r"mine\.safetensors could not be written \(No space .*: it takes .* The same training goes on from step 7\."
        )
        with pytest.raises(JobError, match=told):
            job.run(Callbacks(), None, {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.run"]
    steps = []
    job.run(Callbacks(on_progress=lambda p: steps.append(p.step) if p.phase == "train" else None), None, {})
    assert steps == [7]  # where it goes on: nothing is left to do
    assert job.output.exists()
    assert list(job.folder.glob("state-*")) == []


@pytest.mark.parametrize("phase", ["preview", "measure"])
def test_stopped_in_its_last_measurement_or_preview_a_run_ends_with_the_same_report_and_previews(tmp_path, phase):
    config = replace(CONFIG, preview_every=6)
    whole = Job(AnalyticModel(), PROMPTS, config, tmp_path / "whole" / "mine.safetensors")
    job = Job(AnalyticModel(), PROMPTS, config, tmp_path / "stopped" / "mine.safetensors")
    expected = whole.report(whole.run(Callbacks(), None, {}))
    steps = []

    def stop(progress):
        steps.extend([progress.step] if progress.phase == "train" else [])
        if progress.phase == phase and steps[-1] == 12:
            raise Stopped

    with pytest.raises(Stopped):
        job.run(Callbacks(stop), None, {})
    report = job.report(job.run(Callbacks(), None, {}))
    assert "By noise level" in report
    assert re.sub(r"[\d.]+ minutes", "", report) == re.sub(r"[\d.]+ minutes", "", expected)
    for made in (whole, job):
        assert sorted(path.name for path in (made.folder / "previews").iterdir()) == [
            "step-000006.png",
            "step-000012.png",
        ]


def disk_of(monkeypatch, folder: Path, size: int) -> None:
    """A disk of that size that holds the folder and nothing else."""

    def usage(place):
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return SimpleNamespace(total=size, used=used, free=max(0, size - used))

    monkeypatch.setattr(shutil, "disk_usage", usage)


def plans(monkeypatch, disk_bytes: int) -> list:
    """Runs are planned to take so many bytes of the disk. Returns the configs that are planned."""
    planned = []

    @dataclass
    class Planned:
        disk_bytes: int
        teacher_evaluations: int = 1
        seconds: float | None = 1.0

    def plan(model, config, *_, **__):
        planned.append(config)
        return Planned(disk_bytes)

    monkeypatch.setattr("comfyui_agd.training.job.plan", plan)
    monkeypatch.setattr(AnalyticModel, "available", lambda self: None, raising=False)
    return planned


def test_a_stopped_run_needs_no_room_for_what_it_has_on_the_disk_already(tmp_path, monkeypatch):
    config = replace(CONFIG, save_every=2, keep_states=2)
    job = Job(AnalyticModel(), PROMPTS, config, tmp_path / "mine.safetensors")
    with pytest.raises(Stopped):
        job.run(stop_after(7), None, {})
    states = sum(path.stat().st_size for path in job.folder.glob("state-*"))
    plans(monkeypatch, states + 100_000)
    disk_of(monkeypatch, tmp_path, states + 200_000)
    job.plan()
    (tmp_path / "another file").write_bytes(bytes(150_000))
    with pytest.raises(JobError, match=r"GB of disk, but .* free; make room"):
        job.plan()


def test_training_from_a_recording_needs_no_room_to_reuse_its_states(tmp_path, monkeypatch):
    recording = Job(AnalyticModel(), PROMPTS, CONFIG, tmp_path / "recording").record(4, Callbacks())
    planned, config = plans(monkeypatch, 0), replace(CONFIG, reuse=4)
    how = AnalyticModel(), PROMPTS, config, tmp_path / "mine.safetensors"
    Job(*how).plan()
    Job(*how, recording=recording).plan()
    assert planned == [config, replace(config, reuse=1)]


def in_use(monkeypatch, *names: str) -> None:
    """Files of these names can't be replaced, as on Windows while another program has them open."""
    real = os.replace

    def replace(source, path):
        if Path(path).name in names:
            raise PermissionError(errno.EACCES, "Access is denied")
        real(source, path)

    monkeypatch.setattr(os, "replace", replace)


def test_an_output_in_use_at_the_end_costs_nothing(tmp_path, monkeypatch):
    """Also of a run that is never saved in between, such as `agd calibrate`'s."""
    config = replace(CONFIG, save_every=0)
    whole = Job(AnalyticModel(), PROMPTS, config, tmp_path / "whole.safetensors").run(Callbacks(), None, {})
    job = Job(AnalyticModel(), PROMPTS, config, tmp_path / "mine.safetensors")
    with monkeypatch.context() as patch:
        in_use(patch, "mine.safetensors")
        with pytest.raises(JobError, match=r"another program has it open, .* The same training goes on from step 12\."):
            job.run(Callbacks(), None, {})
    model = AnalyticModel()
    assert_same(Job(model, PROMPTS, config, job.output).run(Callbacks(), None, {}), whole)
    assert model.student_rows == []
    assert list(job.folder.glob("state-*")) == []


SHOWN = ["training.png", "step-000006.png", "metrics.jsonl", "best.safetensors", "report.txt", "config.toml"]


def test_files_that_only_show_a_run_do_not_stop_it(tmp_path, monkeypatch, caplog):
    job = Job(AnalyticModel(), PROMPTS, replace(CONFIG, preview_every=6), tmp_path / "mine.safetensors")
    in_use(monkeypatch, *SHOWN)
    job.run(Callbacks(), None, {})
    adapter_file.load_weights(job.output)
    told = [record.message for record in caplog.records if "goes on, but for one of its files" in record.message]
    assert len(told) == len(SHOWN)
    assert all(any(name in message for message in told) for name in SHOWN)


def test_states_that_can_not_be_removed_do_not_undo_a_training(tmp_path, monkeypatch, caplog):
    real = Path.unlink

    def unlink(path, **how):
        if path.name.startswith("state-"):
            raise PermissionError(errno.EACCES, "Access is denied")
        real(path, **how)

    monkeypatch.setattr(Path, "unlink", unlink)
    job = Job(AnalyticModel(), PROMPTS, replace(CONFIG, save_every=2), tmp_path / "mine.safetensors")
    job.run(Callbacks(), None, {})
    adapter_file.load_weights(job.output)
    assert "state-000012.pt is of no use any more, but can't be removed (Access is denied)" in caplog.text


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, r"it takes 4 bytes, and [\d,]+ are free there; make room, or choose another place\.$"),
        (errno.EACCES, r"another program has it open, or this one may not write there; close that program, allow it, "),
        (errno.EPERM, r"another program has it open, or this one may not write there; close that program, allow it, "),
        (errno.EROFS, r"its disk can only be read; choose another place\.$"),
    ],
)
def test_the_advice_is_of_what_keeps_a_file_from_being_written(tmp_path, monkeypatch, number, advice):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(number, "no")))
    with pytest.raises(NotWritten, match=r"a\.txt could not be written \(no\): " + advice):
        write_text(tmp_path / "a.txt", "text")


@pytest.mark.parametrize(
    "content", [b"not a tensor", b"", save({"weight": torch.zeros(2)})], ids=["text", "empty", "checkpoint"]
)
def test_a_file_that_is_no_adapter_is_not_replaced(tmp_path, content):
    """An output may be named by a config file of a stranger, or by a slip."""
    output = tmp_path / "model.safetensors"
    output.write_bytes(content)
    with pytest.raises(JobError, match=r"model\.safetensors is there already and no adapter .*: choose another output"):
        Job(AnalyticModel(), PROMPTS, CONFIG, output).plan()
    assert output.read_bytes() == content

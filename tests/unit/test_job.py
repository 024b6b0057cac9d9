"""A training job: what its report begins with."""

import re
from dataclasses import replace

import pytest

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel
from comfyui_agd.training.job import Job
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
        with pytest.raises(AdapterFileError, match=r"mine\.safetensors could not be written \(No space .*: it takes"):
            job.run(Callbacks(), None, {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.run"]
    steps = []
    job.run(Callbacks(on_progress=lambda p: steps.append(p.step) if p.phase == "train" else None), None, {})
    assert steps == [5, 6, 7]  # where it goes on, and then each iteration
    assert job.output.exists()
    assert list(job.folder.glob("state-*")) == []

"""A training job: what its report begins with."""

import re
from dataclasses import replace

import pytest

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

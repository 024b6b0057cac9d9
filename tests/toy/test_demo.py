"""The demo end to end, with little training and few pictures."""

import json

import pytest
from PIL import Image

from comfyui_agd.agd_core import checkpoint
from comfyui_agd.examples.toy import demo
from comfyui_agd.examples.toy.measure import omega_star

KEYS = (
    "base omega_star adapter evaluations_per_step seconds_per_image speedup gap_closed direction_cosine "
    "frechet_to_real prompt_accuracy teacher_evaluations training_seconds"
)


@pytest.mark.slow
def test_the_demo_writes_what_it_promises(tmp_path, capsys):
    demo.main(["--out", str(tmp_path), "--iterations", "12", "--captions", "16"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(KEYS.split()) <= set(report)
    assert report["evaluations_per_step"] == {"cfg": 2.0, "agd": 1.0}
    assert report["adapter"]["percent_of_base"] <= 5
    best = omega_star()
    omegas = [f"{omega:g}" for omega in ((1 + best) / 2, best, 2 * best - 1)]
    assert list(report["gap_closed"]) == list(report["prompt_accuracy"]["agd"]) == omegas
    assert checkpoint.read_info(tmp_path / "adapter.safetensors").training["iterations"] == 12
    assert Image.open(tmp_path / "comparison.png").width > 1000
    assert Image.open(tmp_path / "loss.png").size == (800, 400)
    assert "AGD is" in capsys.readouterr().out

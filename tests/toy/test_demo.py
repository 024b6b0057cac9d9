"""The demo end to end, with little training and few pictures."""

import json

import pytest
from PIL import Image

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.examples.toy import demo
from comfyui_agd.examples.toy.bases import BASES
from comfyui_agd.examples.toy.measure import omega_star

KEYS = (
    "base omega_star adapter pictures evaluations_per_step seconds_per_image speedup gap_closed direction_cosine "
    "frechet_to_real prompt_accuracy teacher_evaluations training_seconds"
)


def omegas(base: str) -> list[str]:
    best = omega_star(base)
    return [f"{omega:g}" for omega in ((1 + best) / 2, best, 2 * best - 1)]


@pytest.mark.parametrize("base", BASES)
def test_the_demo_writes_what_it_promises_and_no_figure_of_too_few_pictures(base, tmp_path, capsys):
    demo.main(["--model", base, "--out", str(tmp_path), "--iterations", "12", "--captions", "16"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(KEYS.split()) <= set(report)
    assert report["pictures"] == 16
    assert report["evaluations_per_step"] == {"cfg": 2.0, "agd": 1.0}
    assert report["adapter"]["percent_of_base"] <= {"toy": 5, "toy-dit": 10}[base]
    assert list(report["gap_closed"]) == list(report["prompt_accuracy"]["agd"]) == omegas(base)
    assert list(report["prompt_accuracy"]["cfg_half"]) == [f"{report['omega_star']:g}"]
    assert report["speedup"] is None
    for key in ("prompt_accuracy", "frechet_to_real"):
        by_omega = [value for method in ("cfg", "agd", "cfg_half") for value in report[key][method].values()]
        assert {report[key]["unguided"], *by_omega} == {None}
    assert adapter_file.read_info(tmp_path / "adapter.safetensors").training["iterations"] == 12
    assert Image.open(tmp_path / "comparison.png").width > 1000
    assert Image.open(tmp_path / "loss.png").size == (800, 400)
    table = capsys.readouterr().out
    assert table.count(" -") == 3 * 8  # accuracy, Fréchet distance and time of every line
    assert "AGD is compared with CFG from 256 pictures on" in table


def test_the_table_shows_errors_and_how_many_pictures_there_were(capsys):
    result = demo.MethodResult("agd", 3.0, 20, 0.05, 1.0, 0.97, 0.011, frechet_to_real=170.0)
    gap = type("Gap", (), {"gap_closed": {3.0: 0.7}, "direction_cosine": {3.0: 0.8}})
    report = {"pictures": 256, "adapter": {"parameters": 1000, "percent_of_base": 2.0}, "training_seconds": 200.0}
    report |= {"teacher_evaluations": 500, "speedup": 1.8, "speedup_se": 0.02}
    demo.print_table([result], gap, report)
    table = capsys.readouterr().out
    assert "0.970 (0.011)" in table
    assert "256 pictures per line" in table
    assert "AGD is 1.80 (0.02) times as fast as CFG." in table
    demo.print_table([result], gap, report | {"speedup": None, "speedup_se": None})
    assert "can't be told: the machine was too busy" in capsys.readouterr().out

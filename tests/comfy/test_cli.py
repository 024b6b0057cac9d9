"""The `agd` command as a user runs it: its arguments, what it prints, its exit status, the files that it leaves.

Most tests call it in this process, which has ComfyUI loaded already. Those of how it starts and how it is stopped run
processes of its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib
import torch
from PIL import Image

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.training.cli import ProgressBar, main
from comfyui_agd.training.trainer import Progress

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    *("--width", "64", "--height", "64", "--hidden", "8", "--encoder-width", "8", "--pool", "2"),
    *("--steps-min", "3", "--steps-max", "4", "--learning-rate", "1e-3", "--held-out", "1"),
]


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a {red|blue|green|white|black} star\n")
    return file


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def agd(tmp_path, monkeypatch, capsys) -> Callable[..., Done]:
    """The command in this process, run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Done:
        capsys.readouterr()
        return Done(main(list(args)), *capsys.readouterr())

    return run


def train(prompts: Path, output: Path, *more: str) -> list[str]:
    base = ("--loader", "comfyui_agd.examples.toy.model:load")
    return ["train", *base, "--prompts", str(prompts), "--output", str(output), *SETTINGS, *more]


def equal_weights(first: Path, second: Path) -> bool:
    a, b = (adapter_file.load_weights(path)[1] for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_train_then_again_from_the_runs_config(agd, prompts, tmp_path):
    output, folder = tmp_path / "toy.safetensors", tmp_path / "toy.run"
    done = agd(*train(prompts, output, "--iterations", "4", "--evaluate-every", "2", "--preview-every", "4"))
    assert done.status == 0, done.stderr
    assert "parameters\nevaluations" in done.stdout  # the plan comes first
    assert "Encoding prompts: 0/8\nTraining: 0/4\n" in done.stderr
    assert done.stdout.count(": gap closed ") == 2
    assert "Gap closed on prompts that were not trained with (1)" in done.stdout
    assert adapter_file.read_info(output).training["iterations"] == 4
    names = {path.name for path in folder.iterdir()} - {"tensorboard", ".lock"}
    assert names == {"config.toml", "metrics.jsonl", "previews", "prompts.txt", "report.txt", "training.png"}
    assert Image.open(folder / "previews" / "step-000004.png").size[1] > 256
    assert tomllib.loads((folder / "config.toml").read_text())["batch"] == 4  # resolved, not only what was given
    again = tmp_path / "again.safetensors"
    repeat = ("train", "--config", str(folder / "config.toml"), "--output", str(again))
    refused = agd(*repeat)
    assert refused.status == 1
    said = (
        "names code to run: if you trust it, say so on the command line, with --loader comfyui_agd.examples.toy.model"
    )
    assert said in refused.stderr
    done = agd(*repeat, "--loader", "comfyui_agd.examples.toy.model:load")
    assert done.status == 0, done.stderr
    assert equal_weights(output, again)


def evaluate(adapter: Path | str, *more: str) -> list[str]:
    return ["evaluate", str(adapter), "--loader", "comfyui_agd.examples.toy.model:load", *more]


def test_an_adapter_is_evaluated_and_the_files_say_what_the_report_says(agd, toy, save_adapter, prompts, tmp_path):
    adapter, files = save_adapter(toy.model, kind="cross_attention"), ("--json", "found.json", "--picture", "found.png")
    settings = ("--omega", "2", "4", "--steps", "4", "--count", "3", "--width", "64", "--height", "64")
    done = agd(*evaluate(adapter, "--prompts", str(prompts), *settings, *files))
    assert done.status == 0, done.stderr
    assert "3 images of 3 prompts, latents of 8x8, 4 Euler steps" in done.stdout
    assert "It does not fit: no gap is closed here" in done.stdout  # its weights are random
    found = json.loads((tmp_path / "found.json").read_text())
    for omega in ("2", "4"):
        gap, distance = (found["by_omega"][omega][key]["value"] for key in ("gap_closed", "distance"))
        assert f"cfg {omega}: gap closed {gap:.3f} ±" in done.stdout
        assert distance > 0
    assert {method: cost["evaluations_per_step"] for method, cost in found["costs"].items()} == {
        "unguided": 1,
        "guided": 2,
        "agd": 1,
    }
    assert Image.open(tmp_path / "found.png").size == (4 * 264 - 8, 28 + 3 * 284)


def test_what_needs_no_training_is_evaluated_too(agd):
    settings = ("--omega", "3", "--steps", "6", "--count", "2", "--width", "64", "--height", "64")
    text = ("--prompts", "a large red star on a white background")
    done = agd(*evaluate("attention-guidance", *text, *settings))
    assert done.status == 0, done.stderr
    assert re.search(r"Adapter attention-guidance on ToyConfig \(EPS-prediction, .*\)\.\n", done.stdout)
    assert "AGD: " in done.stdout
    assert "no gap closed in a training of its own is reported" in done.stdout


def test_what_is_in_the_way_of_an_evaluation_is_one_sentence(agd, toy, save_adapter, tmp_path):
    adapter, text = save_adapter(toy.model), ("--prompts", "a red star")
    done = agd(*evaluate(tmp_path / "gone.safetensors", *text))
    assert (done.status, done.stderr[:29]) == (1, "agd: There is no adapter file")
    info, weights = adapter_file.load(adapter)
    other = adapter_file.save(
        tmp_path / "other.safetensors", weights, replace(info, base=replace(info.base, family="X"))
    )
    done = agd(*evaluate(other, *text))
    assert done.status == 1
    assert "was made for X (EPS-prediction" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_the_state_and_the_same_command_goes_on(agd, prompts, tmp_path):
    output = tmp_path / "toy.safetensors"
    command = [Path(sys.executable).with_name("agd"), *train(prompts, output, "--iterations", "4000")]
    begun = output.with_suffix(".run") / "metrics.jsonl"
    with (tmp_path / "stderr").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=log, stdout=subprocess.DEVNULL)
        while not (begun.exists() and begun.read_text()):
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
    text = (tmp_path / "stderr").read_text()
    assert f"agd: Stopped; the same command goes on from {output.with_suffix('.run')}." in text
    assert "Traceback" not in text
    other = agd(*train(prompts, output, "--iterations", "5000"))
    assert "iterations: 4000 then, 5000 now" in other.stderr


@pytest.fixture
def ctrl_c(monkeypatch) -> Callable[[str, int], None]:
    """Ctrl-C at that step of that phase, once."""
    real = ProgressBar.__call__

    def at(phase: str, step: int) -> None:
        def call(bar: ProgressBar, progress: Progress) -> None:
            if (progress.phase, progress.step) == (phase, step):
                signal.raise_signal(signal.SIGINT)
            real(bar, progress)

        monkeypatch.setattr(ProgressBar, "__call__", call)

    return at


@pytest.mark.slow
def test_ctrl_c_before_the_first_state_says_that_the_next_run_starts_again(agd, prompts, tmp_path, ctrl_c, caplog):
    output = tmp_path / "toy.safetensors"
    caplog.set_level("INFO", "comfyui_agd.training")
    command, starts = train(prompts, output, "--iterations", "3"), "the same command starts again."
    ctrl_c("rollout", 0)
    done = agd(*command)
    assert (done.status, done.stderr.splitlines()[-1]) == (1, f"agd: Stopped before anything could be kept; {starts}")
    assert "AGD: the training stopped; the same one starts again" in caplog.text
    ctrl_c("train", 2)
    done = agd(*command)
    assert done.stderr.splitlines()[-1] == f"agd: Stopped; the same command goes on from {tmp_path / 'toy.run'}."
    assert "AGD: the training stopped; the same one goes on from step 2" in caplog.text
    ctrl_c("none", 0)
    assert agd(*command).status == 0


def test_ctrl_c_in_a_recording_says_whether_there_is_something_to_go_on_from(agd, prompts, tmp_path, ctrl_c):
    base = ("--loader", "comfyui_agd.examples.toy.model:load", "--prompts", str(prompts), *SETTINGS)
    command = ("record", *base, "--output", str(tmp_path / "recorded"), "--batches", "66")
    for step, told in (
        (3, "Stopped before anything could be kept; the same command starts again."),
        (65, f"Stopped; the same command goes on from the whole shards in {tmp_path / 'recorded'}."),
    ):
        ctrl_c("record", step)
        assert agd(*command).stderr.splitlines()[-1] == f"agd: {told}"


@pytest.mark.slow
def test_recorded_then_trained_from(agd, prompts, tmp_path):
    base = ("--loader", "comfyui_agd.examples.toy.model:load")
    recording, output = tmp_path / "recording", tmp_path / "toy.safetensors"
    settings = ("--prompts", str(prompts), "--output", str(recording), *SETTINGS, "--iterations", "3", "--reuse", "1")
    done = agd("record", *base, *settings)
    assert done.status == 0, done.stderr
    assert "12 noisy latents, 24 model evaluations" in done.stdout
    args = ("train", *base, "--recording", str(recording), "--output", str(output), "--hidden", "8")
    done = agd(*args, "--iterations", "5", "--preview-every", "0", "--encoder-width", "8")
    assert done.status == 0, done.stderr
    assert adapter_file.read_info(output).training["iterations"] == 5
    other = agd(*args, "--batch", "8")
    assert "was made with other settings of batch" in other.stderr


def test_what_cannot_fit_is_refused_with_what_would(agd, prompts, tmp_path):
    settings = ("--memory", "0.06", "--width", "512", "--height", "512")
    done = agd(*train(prompts, tmp_path / "a.safetensors", *settings))
    assert done.status == 1
    assert "which has 60.0 MB for it; it would fit with width 384, height 384." in done.stderr
    assert not (tmp_path / "a.run").exists()


def test_a_dry_run_writes_nothing(agd, prompts, tmp_path):
    done = agd(*train(prompts, tmp_path / "a.safetensors", "--dry-run"))
    assert done.status == 0, done.stderr
    assert "of the teacher" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_dry_run_counts_the_longest_prompt_wherever_it_is_in_the_list(agd, prompts, tmp_path):
    def megabytes(*lines: str) -> float:
        prompts.write_text("\n".join(lines))
        done = agd(*train(prompts, tmp_path / "a.safetensors", "--dry-run"))
        assert done.status == 0, done.stderr
        return float(re.search(r"^memory +([\d.]+) MB", done.stdout, re.MULTILINE)[1])

    long = " ".join(["a red star"] * 200)
    short = megabytes("a red star", "a blue star")
    assert megabytes("a red star", long, "a blue star") == megabytes(long) > 1.1 * short


def test_a_missing_checkpoint_is_one_sentence(agd, prompts):
    args = ("train", "--checkpoint", "gone.safetensors", "--prompts", str(prompts), "--output", "a.safetensors")
    done = agd(*args)
    assert done.status == 1
    assert re.fullmatch(
        r"agd: There is no checkpoint gone.safetensors, nor one of that name in .*checkpoints\.\n", done.stderr
    )


def test_the_folder_itself_is_the_command_without_any_installation(toy, save_adapter, tmp_path):
    # -S: no .pth files, so no editable install.
    command = [sys.executable, "-S", str(ROOT), "inspect", str(save_adapter(toy.model))]
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert "ToyConfig (EPS-prediction, 7 cross-attentions of width 64/128" in shown.stdout

"""The `agd` command as a user runs it: a process of its own."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from comfyui_agd.agd_core import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    *("--width", "64", "--height", "64", "--hidden", "8", "--encoder-width", "8", "--pool", "2"),
    *("--steps-min", "3", "--steps-max", "4", "--learning-rate", "1e-3"),
]


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"a {colour} star\n" for colour in ("red", "blue", "green", "white", "black")))
    return file


def command(*args: str) -> list[str]:
    """The installed command, or rather what it runs, so that the interpreter is this one."""
    return [sys.executable, "-c", "from comfyui_agd.training.cli import main; raise SystemExit(main())", *args]


def train(prompts: Path, output: Path, *more: str) -> list[str]:
    base = ("--loader", "comfyui_agd.examples.toy.model:load")
    return command("train", *base, "--prompts", str(prompts), "--output", str(output), *SETTINGS, *more)


def run(args: list[str], cwd: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(args, capture_output=True, text=True, cwd=cwd, timeout=300, **options)


def test_train_then_inspect_from_any_folder(prompts, tmp_path):
    output = tmp_path / "toy.safetensors"
    done = run(train(prompts, output, "--iterations", "4"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss=" in done.stderr
    assert "On 1 held-out prompts" in done.stdout
    assert checkpoint.read_info(output).training["iterations"] == 4
    assert output.with_suffix(".png").exists()
    # Without any installation (-S: no .pth files, so no editable install) the folder itself is the command.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    shown = run([sys.executable, "-S", str(ROOT), "inspect", str(output)], tmp_path, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert "ToyConfig (EPS-prediction, 7 cross-attentions of width 64/128" in shown.stdout


@pytest.mark.slow
def test_ctrl_c_keeps_the_state_and_the_same_command_goes_on(prompts, tmp_path):
    output = tmp_path / "toy.safetensors"
    args = train(prompts, output, "--iterations", "4000")
    with (tmp_path / "stderr").open("w") as log:
        process = subprocess.Popen(args, cwd=tmp_path, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        for _ in range(600):
            if "train:" in (tmp_path / "stderr").read_text():
                break
            time.sleep(0.2)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
    text = (tmp_path / "stderr").read_text()
    assert f"agd: Stopped; the same command goes on from {output.with_suffix('.state')}." in text
    assert "Traceback" not in text
    other = run(train(prompts, output, "--iterations", "5000"), tmp_path)
    assert "iterations: 4000 then, 5000 now" in other.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompts"), (b"caf\xe9\n", "is not UTF-8 text")],
)
def test_bad_prompt_files_are_one_sentence(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    done = run(train(file, tmp_path / "a.safetensors"), tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_inspecting_what_is_no_adapter_is_one_sentence(tmp_path):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"nothing")
    done = run(command("inspect", str(file)), tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("agd: ")
    assert "is not a readable safetensors file" in done.stderr


def test_a_missing_checkpoint_is_one_sentence(prompts, tmp_path):
    args = ("train", "--checkpoint", "gone.safetensors", "--prompts", str(prompts), "--output", "a.safetensors")
    done = run(command(*args), tmp_path)
    assert (done.returncode, done.stderr) == (1, "agd: There is no checkpoint gone.safetensors.\n")

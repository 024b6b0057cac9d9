"""A training process that is killed at any moment goes on as if nothing had been."""

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.tests.support.killable import Commands
from comfyui_agd.training.run_folder import RunFolder, folder_of

ITERATIONS, SAVE_EVERY, KILLS = 40, 5, 6
SETTINGS = [
    *("--width", "64", "--height", "64", "--hidden", "8", "--encoder-width", "8", "--pool", "2"),
    *("--steps-min", "3", "--steps-max", "4", "--held-out", "1", "--evaluate-every", "0"),
    *("--preview-every", "0", "--iterations", str(ITERATIONS), "--save-every", str(SAVE_EVERY)),
]


@pytest.fixture
def commands(tmp_path):
    commands = Commands(tmp_path / "log")
    yield commands
    commands.close()


def train(output: Path) -> list[str]:
    prompts = output.parent / "prompts.txt"
    prompts.write_text("".join(f"a {colour} star\n" for colour in ("red", "blue", "green", "white", "black")))
    base = ("--loader", "comfyui_agd.examples.toy.model:load", "--prompts", str(prompts), "--verbatim")
    return ["train", *base, "--output", str(output), *SETTINGS]


def steps(output: Path) -> list[int]:
    """Of the lines in `metrics.jsonl` that are whole."""
    file = folder_of(output) / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def saved_step(output: Path) -> int:
    state = RunFolder(folder_of(output)).load_run_state()
    return state["step"] if state else 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_killed_process_goes_on_to_the_same_adapter(commands, tmp_path):
    whole, killed, chance, lost = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors", random.Random(0), []
    commands.start(*train(whole))
    assert commands.wait() == 0, commands.log.read_text()
    for _ in range(KILLS):
        saved = saved_step(killed)
        commands.start(*train(killed))
        # Some iterations of its own, and then any moment: in an evaluation, in the midst of saving.
        enough = saved + chance.randint(1, 8)
        while len(steps(killed)) < enough or steps(killed)[-1] < enough:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        assert commands.kill() == -9, commands.log.read_text()
        lost.append(steps(killed)[-1] - saved_step(killed))
        assert saved_step(killed) >= saved
    assert 0 <= min(lost) <= max(lost) <= SAVE_EVERY
    assert saved_step(killed) > 0
    commands.start(*train(killed))
    assert commands.wait() == 0, commands.log.read_text()
    expected, resumed = (adapter_file.load_weights(path)[1] for path in (whole, killed))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert steps(killed) == steps(whole) == list(range(1, ITERATIONS + 1))
    assert list(tmp_path.rglob("*.part")) == []
    assert list(tmp_path.rglob("state-*")) == []

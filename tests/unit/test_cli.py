"""The command line as far as it gets without ComfyUI: flags, config files, and what is refused before the long work."""

import dataclasses
import re
from pathlib import Path

import pytest

from comfyui_agd.training import cli
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.job import to_toml

BASE = ("train", "--loader", "some.module:load", "--output", "a.safetensors")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("f", dataclasses.fields(TrainConfig), ids=lambda f: f.name)
def test_every_setting_has_a_flag_and_a_key_in_a_config_file(folder, f):
    value = not f.default if isinstance(f.default, bool) else f.default
    (folder / "c.toml").write_text(to_toml({f.name: value}))
    assert cli._chosen(cli._parse([*BASE, "--config", "c.toml"])) == {f.name: value}


def test_flags_win_over_the_config_file(folder):
    (folder / "c.toml").write_text('iterations = 7\nbatch = 2\nloader = "other:load"\n')
    args = cli._parse([*BASE, "--config", "c.toml", "--iterations", "9"])
    assert cli._chosen(args) == {"iterations": 9, "batch": 2}
    assert args.loader == "some.module:load"


def test_a_card_is_its_memory_unless_memory_is_given():
    assert cli._chosen(cli._parse([*BASE, "--card", "12 GB"])) == {"memory": 11.5}
    assert cli._chosen(cli._parse([*BASE, "--card", "12 GB", "--memory", "5"])) == {"memory": 5.0}


def test_help_names_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--iterations N optimiser steps [1000]" in text
    assert "--solvers NAME [NAME ...]" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterations = = 3", "can't be read"),
        ("iteratons = 3", "unknown settings: iteratons"),
        ('iterations = "many"', "iterations in .* is 'many', but must be of type int"),
        ("iterations = [3]", "must be one value"),
        ('schedulers = "karras"', "must be a list"),
    ],
)
def test_a_bad_config_file_is_one_sentence(folder, capsys, text, message):
    (folder / "c.toml").write_text(text)
    assert cli.main([*BASE, "--config", "c.toml"]) == 1
    assert re.search(message, refused(capsys))


def refused(capsys) -> str:
    """The one sentence on standard error."""
    text = capsys.readouterr().err
    assert text.startswith("agd: ")
    assert "Traceback" not in text
    return text


def fails(capsys, message: str, *args: str) -> None:
    assert cli.main([*args]) == 1
    assert message in refused(capsys)


def test_bad_settings_are_refused_before_anything_is_loaded(capsys):
    fails(capsys, "omega goes from -2.0 to 12.0", *BASE, "--omega-min", "-2")
    fails(capsys, "omega goes from 8.0 to 4.0", *BASE, "--omega-min", "8", "--omega-max", "4")
    fails(capsys, "there is no sampler 'plms' for trajectories", *BASE, "--solvers", "euler", "plms")
    fails(capsys, "aspect ratio 'wide' is not like 3:2", *BASE, "--aspect-ratios", "wide")
    fails(capsys, "must be a file that ends in .safetensors", *BASE[:-1], "a.ckpt")
    fails(capsys, "Give the adapter file to write", *BASE[:-2])
    fails(capsys, "--negative or --negatives, not both", *BASE, "--negative", "blurry", "--negatives", "built-in")


def test_bad_prompt_files_are_refused_before_anything_is_loaded(folder, capsys):
    (folder / "empty.txt").write_text("\n# nothing\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "open.txt").write_text("a {red|blue star\n")
    fails(capsys, "holds no prompts", *BASE, "--prompts", "empty.txt")
    fails(capsys, "UTF-8", *BASE, "--prompts", "latin.txt")
    fails(capsys, "has no }", *BASE, "--prompts", "open.txt")
    fails(capsys, "There is no file gone.txt", *BASE, "--prompts", "gone.txt")


def test_a_folder_that_is_no_recording_is_refused(folder, capsys):
    fails(capsys, "is no recording", *BASE, "--recording", str(folder))


def test_what_is_no_adapter_is_not_inspected(folder, capsys):
    (folder / "lora.safetensors").write_bytes(b"nothing")
    fails(capsys, "is not a readable safetensors file", "inspect", "lora.safetensors")


def test_a_lora_may_have_a_strength_and_a_drive_letter():
    assert cli._lora("style.safetensors:0.5") == (Path("style.safetensors"), 0.5)
    assert cli._lora("style.safetensors") == (Path("style.safetensors"), 1.0)
    assert cli._lora("C:/style.safetensors") == (Path("C:/style.safetensors"), 1.0)

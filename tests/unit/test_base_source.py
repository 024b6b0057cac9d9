"""Where the base comes from: which flags go together, before any of it is loaded."""

import dataclasses
from pathlib import Path

import pytest

from comfyui_agd.training import cli
from comfyui_agd.training.arguments import parse
from comfyui_agd.training.base_source import BaseSource, BaseSourceError, lora_of
from comfyui_agd.training.job import to_toml

TRAIN = ("train", "--output", "a.safetensors")
FILES = ("--diffusion-model", "m.safetensors", "--text-encoder", "t.safetensors")


def given(*flags: str) -> BaseSource:
    return BaseSource.given(parse([*TRAIN, *flags]))


def test_separate_files_are_taken_as_they_are_given():
    source = given(*FILES, "u.safetensors", "--clip-type", "flux", "--vae", "v.safetensors", "--lora", "l:0.5")
    assert (source.diffusion_model, source.vae) == (Path("m.safetensors"), Path("v.safetensors"))
    assert source.text_encoder == (Path("t.safetensors"), Path("u.safetensors"))
    assert (source.clip_type, source.lora, source.checkpoint) == ("flux", ["l:0.5"], None)


VALUES = {
    "diffusion_model": "m",
    "text_encoder": ["t", "u"],
    "clip_type": "wan",
    "vae": "v",
    "lora": ["l:0.5"],
    "other_expert": "o",
    "base_dtype": "fp8",
    "comfyui": "c",
}


def test_a_config_file_says_the_same_as_flags(tmp_path):
    (tmp_path / "c.toml").write_text(to_toml(VALUES))
    flags = []
    for name, value in VALUES.items():
        flags += ["--" + name.replace("_", "-"), *(value if isinstance(value, list) else [value])]
    source = given("--config", str(tmp_path / "c.toml"), "--comfyui", VALUES["comfyui"])  # which runs code
    assert source == given(*flags)
    assert {f.name for f in dataclasses.fields(source) if getattr(source, f.name)} == VALUES.keys()
    assert VALUES.keys() | {"checkpoint", "loader"} == {f.name for f in dataclasses.fields(source)}


@pytest.mark.parametrize("command", ["train", "record", "calibrate", "evaluate"])
def test_every_command_that_takes_a_checkpoint_takes_separate_files(command):
    adapter = ["a.safetensors"] if command == "evaluate" else []
    source = BaseSource.given(parse([command, *adapter, *FILES, "--clip-type", "wan"]))
    assert (source.text_encoder, source.clip_type) == ((Path("t.safetensors"),), "wan")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (),
            r"Give the base: --checkpoint FILE, or --diffusion-model FILE with --text-encoder FILE \.\.\., or --loader",
        ),
        (("--checkpoint", "c", *FILES), "Give the base once: --checkpoint or --diffusion-model, not both"),
        (("--loader", "a:b", "--checkpoint", "c"), "Give the base once: --checkpoint or --loader, not both"),
        (FILES[:2], "A diffusion model's file has no text encoder: give its files, with --text-encoder FILE"),
        (FILES, "Say how the text encoder is used: --clip-type, as in ComfyUI's CLIPLoader or DualCLIPLoader"),
        ((*FILES, "b", "c", "d", "e", "--clip-type", "wan"), "ComfyUI takes up to four text encoders' files, not 5"),
        (("--checkpoint", "c", *FILES[2:]), "--text-encoder belongs to --diffusion-model; the base has its own"),
        (
            ("--checkpoint", "c", *FILES[2:], "--clip-type", "wan"),
            "--text-encoder and --clip-type belong to --diffusion",
        ),
        (("--loader", "a:b", "--vae", "v"), "--vae belongs to files; a --loader function sees to that itself"),
        (("--loader", "a:b", "--lora", "l", "--base-dtype", "fp8"), "--lora and --base-dtype belong to files"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(flags, message):
    with pytest.raises(BaseSourceError, match=rf"^{message}.*\.$"):
        given(*flags)


def test_three_and_four_text_encoders_need_no_type():
    assert given(*FILES, "u", "v").clip_type is None
    assert len(given(*FILES, "u", "v", "w").text_encoder) == 4


def test_they_are_refused_before_prompts_and_comfyui_are_read(capsys):
    assert cli.main([*TRAIN, *FILES, "--prompts", "gone.txt"]) == 1
    assert capsys.readouterr().err.startswith("agd: Say how the text encoder is used")


@pytest.mark.parametrize("name", ["no.such.module:load", "comfyui_agd.examples.toy.model:gone"])
def test_a_function_that_there_is_not_is_refused(name):
    with pytest.raises(BaseSourceError, match=f"--loader {name} names no function"):
        given("--loader", name).load()


def test_a_lora_may_have_a_strength_and_a_drive_letter():
    assert lora_of("style.safetensors:0.5") == (Path("style.safetensors"), 0.5)
    assert lora_of("style.safetensors") == (Path("style.safetensors"), 1.0)
    assert lora_of("C:/style.safetensors") == (Path("C:/style.safetensors"), 1.0)

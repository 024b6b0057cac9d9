"""A transformer's separate files, as `agd` takes them: loaded as ComfyUI's loader nodes load them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import nodes
import pytest
import tomllib
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.comfyui import folders
from comfyui_agd.tests.support import model_files
from comfyui_agd.training.base_source import BaseSource
from comfyui_agd.training.cli import main

NAMES = {"diffusion_model": "model.safetensors", "text_encoder": "encoder.safetensors", "vae": "vae.safetensors"}
SETTINGS = [
    *("--width", "64", "--height", "64", "--hidden", "8", "--rank", "2", "--vector", "8", "--encoder-width", "8"),
    *("--pool", "2", "--batch", "2", "--steps-min", "4", "--steps-max", "5", "--held-out", "1"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[Path]:
    """ComfyUI's models folder, with a model of two experts in separate files."""
    with model_files.models_folder(tmp_path_factory.mktemp("models")) as path, model_files.small_clip():
        model_files.write_diffusion_model(path / "diffusion_models" / NAMES["diffusion_model"])
        model_files.write_diffusion_model(path / "diffusion_models" / "low.safetensors", "low")
        model_files.write_text_encoder(path / "text_encoders" / NAMES["text_encoder"])
        model_files.write_vae(path / "vae" / NAMES["vae"])
        model_files.write_lora(path / "loras" / "style.safetensors")
        yield path


@pytest.fixture
def folder(models, tmp_path, monkeypatch) -> Path:
    """The current folder, with prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a {red|blue|green} fox\n")
    return tmp_path


def flags(**names: str) -> list[str]:
    values = {**NAMES, "clip_type": "sd3", **names}
    return [part for name, value in values.items() for part in ("--" + name.replace("_", "-"), *value.split())]


def source(**changed) -> BaseSource:
    files = {name: Path(value) for name, value in NAMES.items()}
    files["text_encoder"] = (files["text_encoder"],)
    return BaseSource(**{**files, "clip_type": "sd3", **changed})


def weights_of(patcher) -> dict[str, torch.Tensor]:
    return patcher.model.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_they_are_what_the_loader_nodes_load(models):
    loaded = source(other_expert=Path("low.safetensors")).load()
    unets = nodes.UNETLoader()
    assert equal(weights_of(loaded.model), weights_of(unets.load_unet(NAMES["diffusion_model"], "default")[0]))
    assert equal(weights_of(loaded.other_expert), weights_of(unets.load_unet("low.safetensors", "default")[0]))
    clip = nodes.CLIPLoader().load_clip(NAMES["text_encoder"], "sd3")[0]
    one, other = (each.encode_from_tokens_scheduled(each.tokenize("a fox"))[0] for each in (loaded.clip, clip))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1]["pooled_output"], other[1]["pooled_output"])
    latent = torch.randn(1, 16, 4, 4)
    decoded = loaded.vae.decode(latent)
    assert decoded.std() > 0
    assert torch.equal(decoded, nodes.VAELoader().load_vae(NAMES["vae"])[0].decode(latent))


@pytest.mark.parametrize(
    ("dtype", "stored"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2), ("fp32", torch.float32)]
)
def test_weights_are_stored_as_asked(models, dtype, stored):
    loaded = source(base_dtype=dtype, other_expert=Path("low.safetensors")).load()
    assert loaded.model.model.get_dtype() == loaded.other_expert.model.get_dtype() == stored


def test_a_lora_is_on_them_as_lora_loader_has_it(models):
    loaded = source(lora=["style.safetensors:0.5"]).load()
    assert loaded.loras == ["style.safetensors:0.5"]
    ((_, patches),) = loaded.model.patches.items()
    assert patches[0][0] == 0.5


def train(output: Path, *more: str, **names: str) -> list[str]:
    given = ("train", *flags(**names), "--prompts", "prompts.txt", "--output", str(output))
    return [*given, *SETTINGS, "--iterations", "4", *more]


def test_two_experts_in_separate_files_are_trained_and_again_from_the_runs_config(folder, models, tmp_path_factory):
    output, other = folder / "a.safetensors", ("--sigma-to", "0.6", "--preview-every", "4")
    assert main(train(output, *other, other_expert="low.safetensors", lora="style.safetensors:0.5")) == 0
    info, trained = adapter_file.load_weights(output)
    assert (info.base.family, info.training["iterations"]) == ("SD3", 4)
    assert info.training["base_patches"] == {"patched_weights": 1, "loras": ["style.safetensors:0.5"]}
    config = folder / "a.run" / "config.toml"
    found = tomllib.loads(config.read_text())
    assert Path(found["other_expert"]) == models / "diffusion_models" / "low.safetensors"
    assert found["lora"] == [f"{models / 'loras' / 'style.safetensors'}:0.5"]
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "again.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere.parent)
        assert main(["train", "--config", str(config), "--output", str(elsewhere)]) == 0
    assert equal(trained, adapter_file.load_weights(elsewhere)[1])
    # The other expert has had a part in it.
    assert main(train(folder / "b.safetensors", *other, lora="style.safetensors:0.5")) == 0
    assert not equal(trained, adapter_file.load_weights(folder / "b.safetensors")[1])


def test_an_adapter_is_planned_recorded_and_evaluated_on_them(folder, capsys):
    assert main(train(folder / "a.safetensors", "--dry-run")) == 0
    assert "of the teacher" in capsys.readouterr().out
    recorded = ("record", *flags(), "--prompts", "prompts.txt", "--output", "recording", *SETTINGS, "--batches", "2")
    assert main([*recorded, "--reuse", "1"]) == 0
    assert main(train(folder / "a.safetensors", "--preview-every", "0")) == 0
    measured = ("--steps", "2", "--count", "1", "--omega", "3", "--picture", "found.png", "--prompts", "a fox")
    assert main(["evaluate", "a.safetensors", *flags(), *measured]) == 0
    assert "Adapter a.safetensors on SD 3" in capsys.readouterr().out
    assert (folder / "found.png").is_file()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"diffusion_model": "gone.safetensors"},
            "There is no diffusion model gone.safetensors, nor one of that name in ",
        ),
        ({"text_encoder": "gone.safetensors"}, "There is no text encoder gone.safetensors, nor one of that name in "),
        ({"vae": "gone.safetensors"}, "There is no VAE gone.safetensors, nor one of that name in "),
        ({"lora": "gone.safetensors:0.5"}, "There is no LoRA gone.safetensors, nor one of that name in "),
        ({"other_expert": "gone.safetensors"}, "There is no expert gone.safetensors, nor one of that name in "),
        ({"diffusion_model": "wrong.safetensors"}, "wrong.safetensors can't be read as a diffusion model ("),
        ({"other_expert": "wrong.safetensors"}, "wrong.safetensors can't be read as a diffusion model ("),
        ({"diffusion_model": "model.gguf"}, "model.gguf is for a pack's own loader node: use AGD Train in ComfyUI"),
        ({"text_encoder": "wrong.safetensors"}, "wrong.safetensors is no text encoder that ComfyUI knows."),
        ({"text_encoder": "text.safetensors"}, "text.safetensors can't be read as a text encoder ("),
        ({"vae": "lora.safetensors"}, "lora.safetensors can't be read as a VAE ("),
        ({"lora": "text.safetensors"}, "text.safetensors can't be read as a LoRA ("),
        ({"lora": "wrong.safetensors"}, "wrong.safetensors changes nothing in the diffusion model; it is a LoRA of"),
        ({"clip_type": "sd4"}, "There is no --clip-type 'sd4'; ComfyUI has "),
        (
            {"clip_type": "stable_diffusion"},
            "This text encoder makes prompts of 64 channels, and the model takes 4096: choose the text encoder of the",
        ),
        (
            {"text_encoder": "encoder.safetensors encoder.safetensors", "clip_type": "hunyuan_dit"},
            "encoder.safetensors can't be read as the text encoder of --clip-type hunyuan_dit (",
        ),
    ],
)
def test_a_wrong_file_or_type_is_one_sentence(folder, models, capsys, names, message):
    shutil.copy(models / "vae" / NAMES["vae"], folder / "wrong.safetensors")
    shutil.copy(models / "loras" / "style.safetensors", folder / "lora.safetensors")
    (folder / "text.safetensors").write_text("nothing")
    (folder / "model.gguf").write_text("nothing")
    noise_levels = ("--sigma-to", "0.6") if "other_expert" in names else ()
    assert main(train(folder / "a.safetensors", *noise_levels, **names)) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("agd: ")
    assert message in shown
    assert not (folder / "a.run").exists()


def test_a_checkpoint_without_text_encoder_is_to_be_given_as_a_diffusion_model(folder, models, capsys):
    file = models / "diffusion_models" / NAMES["diffusion_model"]
    assert main(["train", "--checkpoint", str(file), "--output", "a.safetensors"]) == 1
    expected = f"agd: {file} has no text encoder: give it as --diffusion-model, and the text encoder's files as "
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)


def test_folders_of_extra_model_paths_are_searched_too(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.safetensors").touch()
    (tmp_path / "extra_model_paths.yaml").write_text(f"mine:\n  base_path: {tmp_path}\n  vae: elsewhere\n")
    monkeypatch.setattr(folder_paths, "base_path", str(tmp_path))
    # In older releases `nodes`, which no command imports, puts another `utils` before ComfyUI's.
    monkeypatch.syspath_prepend(Path(folder_paths.__file__).parent)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae", ([], {".safetensors"}))
    folders._read_extra_model_paths.cache_clear()
    try:
        found = folders.find_model_file(Path("far.safetensors"), ["vae"])
    finally:
        folders._read_extra_model_paths.cache_clear()
    assert found == tmp_path / "elsewhere" / "far.safetensors"

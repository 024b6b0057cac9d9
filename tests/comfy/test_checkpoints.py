"""Full checkpoints of true size with random weights, loaded and sampled by ComfyUI's own nodes."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import folder_paths
import nodes
import pytest
import torch
from comfy.cli_args import args
from safetensors.torch import save_file

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.tests.support.checkpoints import on_meta, write_checkpoint
from comfyui_agd.tests.support.runtime import CFG, Prompts, latent, patched, rows_of
from comfyui_agd.training.cli import main

pytestmark = pytest.mark.slow


@dataclass
class Base:
    model: comfy.model_patcher.ModelPatcher
    prompts: Prompts
    vae: object

    @torch.inference_mode()
    def sample(self, model, *, cfg: float = CFG, steps: int = 1) -> torch.Tensor:
        """KSampler's latent of a picture of 64 x 64 pixels; `model` is the base's own or a patched one."""
        return nodes.KSampler().sample(
            model, 7, steps, cfg, "euler", "normal", self.prompts.positive, self.prompts.negative,
            latent(channels=4),
        )[0]["samples"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A folder that ComfyUI knows as its checkpoints folder."""
    path = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(path)], {".safetensors"}))
        yield path


@pytest.fixture(scope="module")
def sd15(folder) -> Iterator[Path]:
    path = write_checkpoint(folder / "sd15.safetensors", "SD 1.5")
    yield path
    path.unlink()


@contextmanager
def loaded(file: Path) -> Iterator[Base]:
    """As a workflow loads a checkpoint and encodes prompts with it; all memory is given back after."""
    model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(file.name)
    encode = nodes.CLIPTextEncode()
    with torch.inference_mode():
        prompts = Prompts(encode.encode(clip, "a photo of a red fox in the snow")[0], encode.encode(clip, "")[0])
    base = Base(model, prompts, vae)
    del model, clip, vae
    try:
        yield base
    finally:
        base.model = base.vae = None
        free_memory()


def free_memory() -> None:
    comfy.model_management.unload_all_models()
    gc.collect()
    # Under `make`, glibc would keep what is freed.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def check_sampling(base: Base, adapter: Path) -> None:
    results = []

    def run(model, **options):
        results.append(base.sample(model, **options))

    assert rows_of(base.model, run) == [2]
    assert rows_of(base.model, run, cfg=1.0) == [1]
    assert rows_of(patched(base.model, adapter), run) == [1]
    with_cfg, unguided, guided = results
    assert all(torch.isfinite(result).all() for result in results)
    assert not torch.equal(with_cfg, unguided)
    assert not torch.equal(guided, unguided)
    assert torch.equal(base.sample(base.model, cfg=1.0), unguided)
    with torch.inference_mode():
        picture = nodes.VAEDecode().decode(base.vae, {"samples": guided})[0]
    assert picture.shape == (1, 64, 64, 3)
    assert torch.isfinite(picture).all()


def test_sd15_samples_with_one_evaluation_per_step(sd15, save_adapter):
    with loaded(sd15) as base:
        assert (describe_base(base.model.model).family, len(describe_base(base.model.model).layers)) == ("SD15", 16)
        check_sampling(base, save_adapter(base.model, hidden=128, encoder_width=128, prompt_tokens=77))


def write_lora(path: Path) -> Path:
    """A LoRA of one layer of SD 1.5, under the names that LoRA files have."""
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    save_file({f"{layer}.lora_up.weight": torch.ones(320, 1), f"{layer}.lora_down.weight": torch.ones(1, 320)}, path)
    return path


@pytest.fixture(scope="module")
def trained(sd15, tmp_path_factory) -> Path:
    """An adapter that `agd train` made of the SD 1.5 checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prompts.txt").write_text("a red fox\na blue bird\n")
    settings = "--width 64 --height 64 --hidden 8 --encoder-width 8 --batch 1 --pool 1 --steps-min 2 --steps-max 2"
    command = ["train", "--checkpoint", str(sd15), "--prompts", "prompts.txt", "--output", "adapter.safetensors"]
    command += ["--iterations", "2", "--held-out", "0", "--preview-every", "0"]
    command += ["--lora", f"{write_lora(folder / 'style.safetensors')}:0.5", *settings.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(command) == 0
    free_memory()
    return folder / "adapter.safetensors"


def test_agd_train_makes_an_adapter_of_a_checkpoint_file(trained):
    info, adapter = adapter_file.load(trained)
    assert info.base.describe() == "SD 1.5 (EPS-prediction, 16 cross-attentions of width 320/640/1280, context 768)"
    assert info.base.fingerprint
    assert info.training["iterations"] == 2
    assert info.training["base_patches"] == {"patched_weights": 1, "loras": ["style.safetensors:0.5"]}
    assert all(layer.weight.any() for layer in adapter.zero_initialised())


def test_it_samples_another_checkpoint_of_that_structure(trained, folder):
    file = write_checkpoint(folder / "sibling.safetensors", "SD 1.5", seed=1)
    with loaded(file) as base:
        file.unlink()
        assert rows_of(patched(base.model, trained), base.sample, steps=2) == [1, 1]


def meta_patcher(name: str) -> comfy.model_patcher.ModelPatcher:
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(on_meta(name), load_device=cpu, offload_device=cpu)


def test_it_loads_onto_inpainting_models_of_that_structure(trained):
    assert patched(meta_patcher("SD 1.5 inpainting"), trained).get_nested_additional_models()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SD 2.1", r"^This adapter is for SD 1.5 with eps-prediction, your checkpoint is SD 2 with v-prediction\."),
        ("SDXL", r"^This adapter is for SD 1.5, your checkpoint is SDXL\..* 16 cross-.*, but .* 70 cross-.* differ: "),
    ],
)
def test_other_structures_refuse_it_naming_both(trained, name, message):
    with pytest.raises(AdapterFileError, match=message):
        patched(meta_patcher(name), trained)


def test_sdxl_samples_with_one_evaluation_per_step(folder, save_adapter, monkeypatch):
    # ComfyUI would compute in fp32 on a CPU: 10 GB. fp8 in the file, as some checkpoints have it, keeps that small too.
    monkeypatch.setattr(args, "bf16_unet", True)
    file = write_checkpoint(folder / "sdxl.safetensors", "SDXL", unet_dtype=torch.float8_e4m3fn)
    with loaded(file) as base:
        file.unlink()
        assert (describe_base(base.model.model).family, len(describe_base(base.model.model).layers)) == ("SDXL", 70)
        check_sampling(base, save_adapter(base.model, hidden=128, encoder_width=128, prompt_tokens=77))

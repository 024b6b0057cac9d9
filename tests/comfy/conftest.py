"""The real ComfyUI runtime on the CPU, with the toy and with tiny random models."""

import comfy.model_management as mm
import nodes
import pytest
import torch

from comfyui_agd.agd_core import adapter_file, forecast
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.examples.toy.sampling import Toy
from comfyui_agd.tests.support.runtime import Prompts, TinyUNet, random_prompts, tiny
from comfyui_agd.tests.support.small import info_for, randomised


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy.load()


@pytest.fixture(scope="session")
def toy_prompts(toy) -> Prompts:
    encode = nodes.CLIPTextEncode()
    positive = encode.encode(toy.clip, "a small red circle left of a large green star on a white background")[0]
    return Prompts(positive, encode.encode(toy.clip, "")[0])


@pytest.fixture(scope="module")
def base():
    """A MODEL too small to draw anything."""
    return tiny(TinyUNet())


@pytest.fixture
def smooth(monkeypatch) -> None:
    """All steps are forecast that can be: what models of random weights say at neighbouring ones need not follow from
    each other."""
    monkeypatch.setattr(forecast, "TOLERANCE", 1e9)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """For `base`."""
    return random_prompts()


@pytest.fixture(scope="session")
def save_adapter(tmp_path_factory):
    """Writes an adapter for a model, by default one that visibly does something; returns the file."""

    def save(model, **config):
        info = info_for(describe_base(model.model), **{"hidden": 8, "encoder_width": 8, "prompt_tokens": 16, **config})
        torch.manual_seed(3)
        adapter = randomised(Adapter(info.config), seed=4)
        return adapter_file.save(tmp_path_factory.mktemp("adapters") / "random.safetensors", adapter, info)

    return save


@pytest.fixture(scope="module")
def files(request, base, save_adapter):
    """By name, an adapter for each config of the module's HOW."""
    return {name: save_adapter(base, **config) for name, config in request.module.HOW.items()}


@pytest.fixture
def card(monkeypatch):
    """Lets ComfyUI take the CPU for a card of so many bytes that holds `model` alone, and decide what to load."""

    def have(memory: int, model, state: mm.VRAMState = mm.VRAMState.NORMAL_VRAM) -> None:
        real, patchers = mm.get_free_memory, [model, *model.get_nested_additional_models()]

        def free(device=None, torch_free_too=False):
            # Attention asks with `torch_free_too`, and cuts its work to that size.
            loaded = sum(patcher.loaded_size() for patcher in patchers)
            return real(device, True) if torch_free_too else max(0, memory - loaded)

        monkeypatch.setattr(mm, "get_free_memory", free)
        monkeypatch.setattr(mm, "vram_state", state)
        monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
        monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(mm, "EXTRA_RESERVED_VRAM", 0)
        monkeypatch.setattr(mm, "MIN_WEIGHT_MEMORY_RATIO", 1.0)

    return have


@pytest.fixture
def no_dead_models():
    """ComfyUI's ControlNets load all again that is loaded, and fail at clones of which a test has left nothing else."""
    mm.current_loaded_models[:] = [loaded for loaded in mm.current_loaded_models if not loaded.is_dead()]

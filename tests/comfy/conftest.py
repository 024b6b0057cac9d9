"""The real ComfyUI runtime on the CPU, with the toy and with tiny random models."""

import nodes
import pytest
import torch
from runtime import Prompts
from small import info_for, randomised

from comfyui_agd.agd_core import checkpoint
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.sites import describe_base
from comfyui_agd.examples.toy.sampling import Toy


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy.load()


@pytest.fixture(scope="session")
def toy_prompts(toy) -> Prompts:
    encode = nodes.CLIPTextEncode()
    positive = encode.encode(toy.clip, "a small red circle left of a large green star on a white background")[0]
    return Prompts(positive, encode.encode(toy.clip, "")[0])


@pytest.fixture(scope="session")
def save_adapter(tmp_path_factory):
    """Writes an adapter for a model, by default one that visibly does something; returns the file."""

    def save(model, **config):
        info = info_for(describe_base(model.model), **{"hidden": 8, "encoder_width": 8, "prompt_tokens": 16, **config})
        torch.manual_seed(3)
        adapter = randomised(Adapter(info.config), seed=4)
        return checkpoint.save(tmp_path_factory.mktemp("adapters") / "random.safetensors", adapter, info)

    return save

"""The base of the compatibility tests, adapters for it, and LoRA files where ComfyUI looks for them."""

from pathlib import Path

import folder_paths
import pytest
import torch
from companions import write_lora
from runtime import TwoWidths, tiny
from small import info_for, randomised
from workflows import LORA, OTHER_LORA, PROMPTS

from comfyui_agd.agd_core import checkpoint
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.sites import describe_base


@pytest.fixture(scope="package")
def base():
    return tiny(TwoWidths())


@pytest.fixture(scope="package", params=[("cross_attention", 0), ("delta", 0), ("delta", 4)], ids=str)
def save(request, base, tmp_path_factory):
    """Writes an adapter that was trained with the workflows' negative prompt for its unconditional."""
    kind, rank = request.param
    config = {"kind": kind, "rank": rank, "hidden": 8, "encoder_width": 8, "prompt_tokens": 16}
    info = info_for(describe_base(base.model), **config)

    def save(name: str, make) -> Path:
        torch.manual_seed(3)
        adapter = make(Adapter(info.config))
        adapter.unconditional.copy_(PROMPTS.negative[0][0][0])
        return checkpoint.save(tmp_path_factory.mktemp("adapters") / name, adapter, info)

    return save


@pytest.fixture(scope="package")
def file(save):
    return save("random.safetensors", randomised)


@pytest.fixture(scope="package")
def other(save):
    return save("other.safetensors", lambda adapter: randomised(adapter, seed=9))


@pytest.fixture(scope="package")
def new(save):
    """An adapter that has learnt nothing."""
    return save("new.safetensors", lambda adapter: adapter)


@pytest.fixture(autouse=True, scope="package")
def loras(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate((LORA, OTHER_LORA)):
        write_lora(folder / name, base, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
        yield

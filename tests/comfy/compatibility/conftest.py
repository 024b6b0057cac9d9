"""The base of the compatibility tests, adapters for it, and LoRA files where ComfyUI finds them."""

import functools
from pathlib import Path

import folder_paths
import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.tests.support.companions import write_lora
from comfyui_agd.tests.support.runtime import TwoWidths, tiny
from comfyui_agd.tests.support.small import info_for, randomised
from comfyui_agd.tests.support.workflows import LORA, OTHER_LORA, PROMPTS


@pytest.fixture(scope="package")
def base():
    return tiny(TwoWidths())


KINDS = [("cross_attention", 0), ("delta", 0), ("delta", 4)]


@pytest.fixture(scope="package")
def adapters(base, tmp_path_factory):
    """A function: the file of an adapter of a kind (with its rank) that was trained with the workflows' negative prompt
    for its unconditional. `make`: what becomes of a new one."""

    @functools.cache
    def save(kind: tuple[str, int], make=randomised) -> Path:
        name, rank = kind
        config = {"kind": name, "rank": rank, "hidden": 8, "encoder_width": 8, "prompt_tokens": 16}
        info = info_for(describe_base(base.model), **config)
        torch.manual_seed(3)
        adapter = make(Adapter(info.config))
        adapter.unconditional.copy_(PROMPTS.negative[0][0][0])
        return adapter_file.save(tmp_path_factory.mktemp("adapters") / "adapter.safetensors", adapter, info)

    return save


@pytest.fixture(scope="package", params=KINDS, ids=str)
def kind(request) -> tuple[str, int]:
    return request.param


@pytest.fixture(scope="package")
def file(adapters, kind):
    return adapters(kind)


@pytest.fixture(scope="package")
def other(adapters, kind):
    return adapters(kind, functools.partial(randomised, seed=9))


@pytest.fixture(autouse=True, scope="package")
def loras(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate((LORA, OTHER_LORA)):
        write_lora(folder / name, base, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
        yield

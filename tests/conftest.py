"""Makes ComfyUI importable before any test module asks for it; a small base and its adapter, torch only."""

import gc
import os

# One thread each, here and in the processes that tests start: they run side by side, and equal to the bit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from small import info_for, randomised, small_sites

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.checkpoint import AdapterInfo
from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.agd_core.config import BaseInfo

use_comfyui(cpu=True)

# Files begin in this order, so that none of them is left to run alone at the end; all others follow.
LONGEST_FIRST = ("compatibility/test_table.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        places = [i for i, name in enumerate(LONGEST_FIRST) if item.path.as_posix().endswith(name)]
        return places[0] if places else len(LONGEST_FIRST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    # What was imported stays: without it, tests that collect garbage take a tenth of the time.
    gc.collect()
    gc.freeze()


@pytest.fixture
def base() -> BaseInfo:
    return BaseInfo("Small", "EPS", small_sites(), {"model_channels": 24}, "abc")


@pytest.fixture
def info(base) -> AdapterInfo:
    return info_for(base, hidden=8, encoder_width=8)


@pytest.fixture
def adapter(info) -> Adapter:
    torch.manual_seed(0)
    return randomised(Adapter(info.config))

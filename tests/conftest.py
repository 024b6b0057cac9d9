"""Makes ComfyUI importable before any test module asks for it; a small base and its adapter, torch only."""

import gc
import importlib
import os
from pathlib import Path

# One thread each, here and in the processes that tests start: they run side by side, and equal to the bit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterInfo
from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.agd_core.config import BaseInfo
from comfyui_agd.tests.support.small import TIME_CHANNELS, info_for, randomised, small_layers

use_comfyui(cpu=True)

# First, as ComfyUI's main.py has it: the `nodes` of older releases puts a folder with another `utils` on the path.
importlib.import_module("utils.install_util")

TESTS = Path(__file__).parent
# Files begin in this order, so that none of them is left to run alone at the end; all others follow.
LONGEST_FIRST = (
    "browser/test_editor.py",
    "server/test_server.py",
    "toy/test_quality.py",
    "comfy/compatibility/test_table.py",
    "comfy/test_checkpoints.py",
    "toy/test_demo.py",
    "server/test_requeue.py",
    "server/test_archive.py",
    "server/test_names.py",
    "comfy/test_cli.py",
    "comfy/test_trace.py",
    "comfy/compatibility/test_compile.py",
    "comfy/compatibility/test_equalities.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(LONGEST_FIRST)}
    if gone := [str(file) for file in places if not file.exists()]:
        raise pytest.UsageError(f"tests/conftest.py names files that are gone: {', '.join(gone)}")
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A new layer's weights are random: they are the same whatever ran before."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    # What was imported stays: without it, tests that collect garbage take a tenth of the time.
    gc.collect()
    gc.freeze()


@pytest.fixture
def base() -> BaseInfo:
    architecture = {"model_channels": 24, "time_channels": TIME_CHANNELS, "num_res_blocks": [2, 2]}
    return BaseInfo("Small", "EPS", small_layers(), architecture, "abc")


@pytest.fixture
def info(base) -> AdapterInfo:
    return info_for(base, hidden=8, encoder_width=8)


@pytest.fixture
def adapter(info) -> Adapter:
    return randomised(Adapter(info.config))

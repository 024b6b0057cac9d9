"""Makes ComfyUI importable before any test module asks for it; a small base and its adapter, torch only."""

import pytest
import torch
from small import info_for, randomised, small_sites

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.checkpoint import AdapterInfo
from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.agd_core.config import BaseInfo

use_comfyui(cpu=True)


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

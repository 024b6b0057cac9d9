"""Small adapters for every tier; torch only."""

import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.checkpoint import AdapterInfo
from comfyui_agd.agd_core.config import AdapterConfig, BaseInfo, Site


def small_sites() -> tuple[Site, ...]:
    return Site("input_1_0", 24, 16), Site("middle_0_0", 32, 16)


def randomised(adapter: Adapter, seed: int = 0) -> Adapter:
    """An adapter whose zero-initialised layers are not zero, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.last():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def info_for(base: BaseInfo, **config) -> AdapterInfo:
    return AdapterInfo(AdapterConfig(sites=base.sites, **config), base, omega_range=(1.0, 12.0))

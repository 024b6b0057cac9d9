"""Small adapters for every tier; torch only."""

import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterInfo
from comfyui_agd.agd_core.config import AdapterConfig, BaseInfo, Site


def small_sites() -> tuple[Site, ...]:
    return Site("input_1_0", 24, 16), Site("middle_0_0", 32, 16)


def randomised(adapter: Adapter, seed: int = 0) -> Adapter:
    """A new adapter whose zero-initialised parameters are not zero, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def info_for(base: BaseInfo, **config) -> AdapterInfo:
    return AdapterInfo(AdapterConfig(sites=base.sites, **config), base, omega_range=(1.0, 12.0))

"""A scale adapter with constants, which nothing was trained for: the base's attention to both prompts guides."""

from dataclasses import replace

import torch

from .adapter import Adapter
from .adapter_file import AdapterInfo
from .config import AdapterConfig, BaseInfo
from .kinds.scale import ScaleConfig

NAME = "attention-guidance"


def attention_guidance(base: BaseInfo) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """A new scale adapter: info and weights, as from a file. It needs a negative prompt to guide away from."""
    adapter = Adapter(AdapterConfig(base.layers, ScaleConfig(), prompt_tokens=1, vector=base.vector))
    base = replace(base, fingerprint="")  # it is of no checkpoint in particular
    info = AdapterInfo(config=adapter.config, base=base, omega_range=(1.0, 6.0), unconditional="", negative_mode="used")
    return info, adapter.state_dict()

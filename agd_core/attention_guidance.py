"""Guidance from the base's attention to both prompts, with constants and nothing trained (DESIGN 1.10)."""

from dataclasses import replace

import torch

from .adapter import Adapter
from .adapter_file import AdapterInfo
from .config import AdapterConfig, BaseInfo

NAME = "attention-guidance"


def attention_guidance(base: BaseInfo) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """A new adapter of the kind "scale": info and weights, as from a file. It needs a negative prompt to guide from."""
    adapter = Adapter(AdapterConfig(sites=base.sites, kind="scale", prompt_tokens=1))
    base = replace(base, fingerprint="")  # it is of no checkpoint in particular
    info = AdapterInfo(adapter.config, base, omega_range=(1.0, 6.0), unconditional="", negative_mode="used")
    return info, adapter.state_dict()

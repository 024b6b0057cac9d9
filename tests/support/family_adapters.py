"""Small adapters of the tiny families, and a text encoder to train them with."""

import functools
from dataclasses import fields

import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterInfo
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings
from comfyui_agd.agd_core.config import AdapterConfig, BaseInfo
from comfyui_agd.agd_core.kinds import KINDS, kind_config
from comfyui_agd.training.presets import settings_for

from .small import randomised
from .tiny_families import conditioning, tiny_model

SMALL = {"rank": 2, "hidden": 8, "vector": 8, "encoder_width": 8}


class TinyClip:
    """CLIP for a family's prompts, random ones."""

    def __init__(self, name: str):
        self.name = name

    def tokenize(self, text: str) -> dict[str, list]:
        return {"letters": [list(text)]}

    def encode_from_tokens_scheduled(self, tokens: dict[str, list]) -> list:
        ((letters,),) = tokens.values()
        ((cond, entries),) = conditioning(self.name, "".join(letters))
        return [[cond, {"pooled_output": None, **entries}]]


@functools.cache
def base_of(name: str) -> BaseInfo:
    return describe_base(tiny_model(name).model)


def default_kind(name: str) -> str:
    """Of adapters for that family."""
    return settings_for(base_of(name), {}).kind


def config_of(name: str, kind: str | None = None, **settings) -> AdapterConfig:
    kind, base = kind or default_kind(name), base_of(name)
    chosen = {**SMALL, **settings}
    own = {key: value for key, value in chosen.items() if key in {f.name for f in fields(KINDS[kind].Config)}}
    return AdapterConfig(base.layers, kind_config(kind, **own), 8, base.vector)


def adapter_of(name: str, kind: str | None = None, **settings) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """One that does something, as from a file."""
    config = config_of(name, kind, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        weights = randomised(Adapter(config)).state_dict()
    return AdapterInfo(config=config, base=base_of(name), omega_range=(1.0, 12.0), negative_mode="used"), weights


def adapted(name: str, model, kind: str | None = None, notify=lambda message: None, **settings):
    """`model` with such an adapter. `settings`: the loader's."""
    return apply_adapter(model, *adapter_of(name, kind), GuidanceSettings(**settings), source="the file", notify=notify)

"""Adapter files as earlier versions wrote them."""

import json
from pathlib import Path

from safetensors.torch import save_file

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.config import BaseInfo
from comfyui_agd.tests.support.small import config_for, randomised, small_layers

BASE = BaseInfo("SD15", "EPS", small_layers(), {"model_channels": 320}, "abc")
_SITES = [{"name": layer.name, "width": layer.width, "context_dim": layer.context_dim} for layer in BASE.layers]
_FLAT = {
    "sites": _SITES,
    "hidden": 8,
    "gain": True,
    "omega_embedding": "log",
    "shared_encoder": True,
    "encoder_width": 8,
    "prompt_tokens": 5,
    "modulated": False,
    "rank": 0,
}


def write_format_1(path: Path, kind: str, **changes) -> Adapter:
    """A file with these changes of its config; returns the adapter that is in it."""
    flat = {**_FLAT, "kind": kind, **changes}
    settings = {key: value for key, value in flat.items() if key != "sites"}
    if kind == "low_rank":
        settings["rank"] = flat["hidden"]
    adapter = randomised(Adapter(config_for(BASE.layers, **settings)))
    base = {"family": "SD15", "prediction": "EPS", "sites": _SITES, "architecture": BASE.architecture}
    described = {
        "format_version": 1,
        "config": flat,
        "base": base | {"fingerprint": "abc"},
        "omega_range": [1.0, 12.0],
        "unconditional": "empty prompt",
        "negative_mode": "used" if adapter.uses_negative else "ignored",
        "resolutions": [[64, 64]],
        "training": {"iterations": 3, "teacher": {"patched_weights": 2}, "config": {"teacher": "cfg"}},
    }
    weights = {key.replace("kind.", "sites.", 1): value for key, value in adapter.state_dict().items()}
    save_file(weights, str(path), {"agd": json.dumps(described)})
    return adapter


def as_format_2(description: str) -> str:
    """A description of today, of an adapter that doesn't change the vector, as version 2 had it."""
    described = json.loads(description)
    described["format_version"] = 2
    for name in ("vector", "attention_every"):
        described["config"]["settings"].pop(name, None)
    del described["config"]["vector"], described["base"]["vector"]
    for layer in described["base"]["layers"]:
        del layer["reads_prompt"]
    return json.dumps(described)

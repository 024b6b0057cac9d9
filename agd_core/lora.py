"""Low-rank changes without modulation as a LoRA: merged into the weights, guidance at a fixed scale costs nothing.

Names and weights are those of kohya's scripts: for each layer `lora_up` (out, r), `lora_down` (r, in) and alpha, of
which loaders make `W + alpha / r * up @ down`. A low_rank adapter is nothing else and can be written to a file: at
strength 1, without CFG, the model is then the one with the adapter at `omega`.
"""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import adapter_file
from .adapter_file import AdapterInfo
from .kinds.low_rank import LowRankConfig, key_of

# How an exported file describes itself, around the guidance scale.
_BEFORE, _AFTER = "Guidance at scale ", " (AGD): use it at strength 1 and cfg 1."


def lora_key(layer: str, linear: str) -> str:
    """A linear layer's name in a LoRA file, of its block's path in the base's network and its own in the block."""
    return f"lora_unet_{layer}.{linear}".replace(".", "_")


def low_rank_as_lora(
    info: AdapterInfo, weights: dict[str, torch.Tensor], scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """What an adapter with `config.kind.merges` does to the linear layers at omega = 1 + `scale`, as a LoRA."""
    found, kind = {}, info.config.kind
    inside = "kind" if isinstance(kind, LowRankConfig) else "kind.low_rank"
    for layer in info.config.layers:
        for linear in layer.linears:
            key, name = key_of(layer.name, linear.path), lora_key(layer.path, linear.path)
            if (up := weights.get(f"{inside}.to_out.{key}.weight")) is None:
                continue  # delta leaves keys and values as they are
            found[f"{name}.lora_up.weight"] = up if scale == 1 else scale * up
            found[f"{name}.lora_down.weight"] = weights[f"{inside}.down.{key}.weight"]
            found[f"{name}.alpha"] = torch.tensor(float(kind.lora_rank))
    return found


def lora(info: AdapterInfo, weights: dict[str, torch.Tensor], omega: float) -> dict[str, torch.Tensor]:
    """A low_rank adapter's weights as a LoRA's of strength 1. Raises `ValueError` where it is none."""
    kind = info.config.kind
    if not isinstance(kind, LowRankConfig) or kind.modulated:
        shown = f"{kind.name} modulated by timestep and guidance" if isinstance(kind, LowRankConfig) else kind.name
        raise ValueError(f"This adapter is {shown}, which no LoRA can express: train one with --kind low_rank.")
    if kind.vector:
        raise ValueError(
            "This adapter also changes the timestep's vector, which no LoRA can: train one with --kind low_rank "
            "--vector 0."
        )
    if not 0 < omega < math.inf:
        raise ValueError(f"The guidance scale is {omega:g}, but must be a number above 0.")
    return low_rank_as_lora(info, weights, omega - 1)


def is_export(path: str | Path) -> bool:
    """Whether a file is a LoRA that `export` wrote."""
    try:
        with safe_open(str(path), framework="pt") as file:
            description = (file.metadata() or {}).get("modelspec.description", "")
    except (SafetensorError, OSError):
        return False
    return description.startswith(_BEFORE) and description.endswith(_AFTER)


def export(adapter: str | Path, output: str | Path, omega: float) -> Path:
    """Write the adapter's file as a LoRA. Returns the path; raises `ValueError`."""
    info, weights = adapter_file.load_weights(adapter)
    rank = str(info.config.kind.lora_rank)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{info.base.family.lower()}/lora",
        "modelspec.title": Path(output).stem,
        "modelspec.description": f"{_BEFORE}{omega:g}{_AFTER}",
    }
    return adapter_file.write(output, lora(info, weights, omega), metadata)

"""Low-rank changes without modulation as a LoRA: merged into the weights, guidance at a fixed scale costs nothing.

Names and weights are those of kohya's scripts: for each layer `lora_up` (out, r), `lora_down` (r, in) and alpha, of
which loaders make `W + alpha / r * up @ down`. A low_rank adapter is nothing else and can be written to a file: at
strength 1, without CFG, the model is then the one with the adapter at `omega`.
"""

import math
from pathlib import Path

import torch

from . import adapter_file
from .adapter_file import AdapterInfo
from .kinds.low_rank import key_of, layers_of

_BLOCKS = {"input": "input_blocks.{}", "middle": "middle_block", "output": "output_blocks.{}"}


def module_path(site: str) -> str:
    """Where a UNet has the transformer block of a site: "input_1_0" -> "input_blocks.1.1.transformer_blocks.0".

    Each block begins with its residual block, so the transformer is its second module.
    """
    kind, number, index = site.rsplit("_", 2)
    return f"{_BLOCKS[kind].format(number)}.1.transformer_blocks.{index}"


def low_rank_part(info: AdapterInfo, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA whose strength is omega - 1: what an adapter with `config.merges` does to the linear layers."""
    config, found = info.config, {}
    inside, rank = ("sites.low_rank", config.rank) if config.rank else ("sites", config.hidden)
    for site in config.sites:
        for path in layers_of(site):
            key, name = key_of(site.name, path), f"lora_unet_{module_path(site.name)}.{path}".replace(".", "_")
            if (up := state.get(f"{inside}.to_out.{key}.weight")) is None:
                continue  # delta leaves keys and values as they are
            found[f"{name}.lora_up.weight"] = up
            found[f"{name}.lora_down.weight"] = state[f"{inside}.down.{key}.weight"]
            found[f"{name}.alpha"] = torch.tensor(float(rank))
    return found


def lora(info: AdapterInfo, state: dict[str, torch.Tensor], omega: float) -> dict[str, torch.Tensor]:
    """A low_rank adapter's weights as a LoRA's of strength 1. Raises `ValueError` where it is none."""
    config = info.config
    if config.kind != "low_rank" or config.modulated:
        kind = f"{config.kind} with modulation by t and omega" if config.kind == "low_rank" else config.kind
        raise ValueError(f"This adapter is {kind}, which no LoRA can express: train one with --kind low_rank.")
    if not 0 < omega < math.inf:
        raise ValueError(f"omega is {omega:g}, but must be a number above 0.")
    part = low_rank_part(info, state)
    return {key: (omega - 1) * value if key.endswith("lora_up.weight") else value for key, value in part.items()}


def export(adapter: str | Path, output: str | Path, omega: float) -> Path:
    """Write the adapter's file as a LoRA. Returns the path; raises `ValueError`."""
    info, state = adapter_file.load_state(adapter)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(info.config.hidden),
        "ss_network_alpha": str(info.config.hidden),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{info.base.family.lower()}/lora",
        "modelspec.title": Path(output).stem,
        "modelspec.description": f"Guidance at scale {omega:g} (AGD): use it at strength 1 and cfg 1.",
    }
    return adapter_file.write(output, lora(info, state, omega), metadata)

"""Adapter files of formats 1 to 3: their description and weights as format 4 has them."""

from typing import Any

import torch

_BLOCKS = {"input": "input_blocks.{}", "middle": "middle_block", "output": "output_blocks.{}"}
_FIELDS = {"sites", "kind", "hidden", "gain", "omega_embedding", "shared_encoder", "encoder_width", "prompt_tokens"}
_FIELDS |= {"modulated", "rank"}
# The fields of its one config that a kind has a use for.
_ENCODER = ("gain", "omega_embedding", "encoder_width")
_SETTINGS = {
    "cross_attention": (*_ENCODER, "hidden", "shared_encoder"),
    "offset": (*_ENCODER, "hidden", "shared_encoder"),
    "delta": (*_ENCODER, "hidden", "rank", "modulated"),
    "low_rank": (*_ENCODER, "modulated"),
    "scale": ("gain",),
}


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A description as one of format 4, to be checked as such. Raises `ValueError` where nothing can be made of it."""
    version, following = data["format_version"], {1: _format_2, 2: _format_3, 3: _format_4}
    try:
        while (before := data["format_version"]) in following:
            data = following[before](data)
        return data
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"it is no description of format {version} ({type(error).__name__}: {error})") from error


def _format_4(data: dict[str, Any]) -> dict[str, Any]:
    """Before, adapters worked in the attentions of all blocks."""
    config = data["config"]
    more = {"attention_every": 1} if config["kind"] in ("delta", "scale") else {}
    return {**data, "format_version": 4, "config": {**config, "settings": {**config["settings"], **more}}}


def _format_3(data: dict[str, Any]) -> dict[str, Any]:
    """What formats before 3 don't say: there was nothing that changes the vector of the timestep."""
    config, base = data["config"], data["base"]
    settings = {**config["settings"], **({"vector": 0} if config["kind"] in ("delta", "low_rank") else {})}
    layers = [{**layer, "reads_prompt": base["layout"] == "unet"} for layer in base["layers"]]
    config = {**config, "settings": settings, "vector": 0}
    return {**data, "format_version": 3, "config": config, "base": {**base, "layers": layers, "vector": 0}}


def _format_2(data: dict[str, Any]) -> dict[str, Any]:
    """A description of format 1 as one of format 2."""
    flat, base = data["config"], data["base"]
    if set(flat) != _FIELDS:
        missing, unknown = sorted(_FIELDS - set(flat)), sorted(set(flat) - _FIELDS)
        raise ValueError(f"AdapterConfig: missing fields {missing}, unknown fields {unknown}")
    settings = {name: flat[name] for name in _SETTINGS.get(flat["kind"], ())}
    if flat["kind"] == "low_rank":
        settings["rank"] = flat["hidden"]
    config = {"layers": [site["name"] for site in flat["sites"]], "prompt_tokens": flat["prompt_tokens"]}
    config |= {"kind": flat["kind"], "settings": settings}
    own = {name: value for name, value in base.items() if name != "sites"}
    own |= {"layout": "unet", "layers": [unet_layer(site) for site in base["sites"]]}
    training = {"base_patches" if key == "teacher" else key: value for key, value in data["training"].items()}
    return {**data, "format_version": 2, "config": config, "base": own, "training": training}


def unet_layer(site: dict[str, Any]) -> dict[str, Any]:
    """A cross-attention of a UNet from its name and channels, which is what format 1 keeps; as `AdapterLayer`'s fields.

    Each block of a UNet begins with its residual block, so the transformer is its second module.
    """
    name, w, d = site["name"], site["width"], site["context_dim"]
    kind, number, index = name.rsplit("_", 2)
    linears = [
        *((f"attn1.{path}", w, w, False) for path in ("to_q", "to_k", "to_v", "to_out.0")),
        *((f"attn2.{path}", w, w, False) for path in ("to_q", "to_out.0")),
        *((f"attn2.{path}", d, w, True) for path in ("to_k", "to_v")),
        ("ff.net.0.proj", w, 8 * w, False),
        ("ff.net.2", 4 * w, w, False),
    ]
    return {
        **site,
        "path": f"{_BLOCKS[kind].format(number)}.1.transformer_blocks.{index}",
        "innermost": kind == "middle",
        "linears": [list(linear) for linear in linears],
    }


def name_of_today(weight: str) -> str:
    """Format 1 had other names of weights."""
    return f"kind.{weight.removeprefix('sites.')}" if weight.startswith("sites.") else weight


def rename_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names of today."""
    return {name_of_today(key): value for key, value in weights.items()}

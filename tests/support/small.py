"""Small adapters for every tier; torch only."""

from dataclasses import fields, replace

import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterInfo
from comfyui_agd.agd_core.config import AdapterConfig, AdapterLayer, BaseInfo, Linear
from comfyui_agd.agd_core.kinds import KINDS, kind_config

TIME_CHANNELS = 12


def small_layer(name: str, path: str, width: int, context_dim: int = 16) -> AdapterLayer:
    """With the linear layers of a UNet's transformer block."""
    w, d = width, context_dim
    linears = [Linear(f"attn1.{linear}", w, w) for linear in ("to_q", "to_k", "to_v", "to_out.0")]
    linears += [Linear(f"attn2.{linear}", w, w) for linear in ("to_q", "to_out.0")]
    linears += [Linear(f"attn2.{linear}", d, w, reads_prompt=True) for linear in ("to_k", "to_v")]
    linears += [Linear("ff.net.0.proj", w, 8 * w), Linear("ff.net.2", 4 * w, w)]
    return AdapterLayer(name, path, w, d, innermost=name.startswith("middle"), linears=tuple(linears))


def small_layers() -> tuple[AdapterLayer, ...]:
    return (
        small_layer("input_1_0", "input_blocks.1.1.transformer_blocks.0", 24),
        small_layer("middle_0_0", "middle_block.1.transformer_blocks.0", 32),
    )


def randomised(adapter: Adapter, seed: int = 0) -> Adapter:
    """A new adapter whose zero-initialised parameters are not zero, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter.trained():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def config_for(
    layers: tuple[AdapterLayer, ...],
    kind: str = "delta",
    *,
    prompt_tokens: int = 77,
    time_channels: int = TIME_CHANNELS,
    **settings,
) -> AdapterConfig:
    """Of a kind by its name; settings that it has no use for are left out, so that one test may go through all.

    `hidden` is the rank of low_rank, as in training's settings.
    """
    if kind == "low_rank":
        settings = {"rank": settings.get("hidden", 16), **settings}
    own = {f.name for f in fields(KINDS[kind].Config)}
    chosen = {name: value for name, value in settings.items() if name in own}
    return AdapterConfig(layers, kind_config(kind, **chosen), prompt_tokens, time_channels=time_channels)


def info_for(base: BaseInfo, kind: str = "delta", **settings) -> AdapterInfo:
    config = config_for(base.layers, kind, time_channels=base.time_channels, **settings)
    config = replace(config, layers=config.kind.layers_of(base))
    return AdapterInfo(config=config, base=base, omega_range=(1.0, 12.0))

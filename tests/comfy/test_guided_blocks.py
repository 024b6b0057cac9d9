"""Adapters that work in the attention of every n-th block of a stack: nothing but those of all blocks with less in."""

import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterInfo
from comfyui_agd.agd_core.comfyui.backbones import describe_base
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings
from comfyui_agd.agd_core.config import AdapterConfig, AdapterLayer, every_nth
from comfyui_agd.tests.support.family_adapters import adapter_of, base_of, config_of
from comfyui_agd.tests.support.runtime import Prompts, TinyUNet, ksampler, random_prompts, tiny
from comfyui_agd.tests.support.small import info_for, randomised, small_layer
from comfyui_agd.tests.support.tiny_families import TINY_FAMILIES, conditioning, empty_latent, flat, tiny_model

GUIDED = [name for name in TINY_FAMILIES if config_of(name).guided_layers]


def layers_named(*names: str) -> tuple[AdapterLayer, ...]:
    return tuple(small_layer(name, "a", 24) for name in names)


def test_of_each_stack_the_first_block_is_among_them():
    stacks = layers_named(*(f"input_4_{i}" for i in range(2)), *(f"input_7_{i}" for i in range(10)), "middle_0_0")
    assert every_nth(stacks, 1) == stacks
    assert [each.name for each in every_nth(stacks, 10)] == ["input_4_0", "input_7_0", "middle_0_0"]
    in_seven = [f"input_7_{i}" for i in (0, 4, 8)]
    assert [each.name for each in every_nth(stacks, 4)] == ["input_4_0", *in_seven, "middle_0_0"]


def as_of_all_blocks(info: AdapterInfo, weights: dict[str, torch.Tensor]) -> tuple[AdapterInfo, dict]:
    """The adapter of all blocks that does nothing in the attention of those that this one leaves out."""
    kind = config_of_all(info.config)
    whole = Adapter(kind)
    given = {name: torch.zeros_like(value) for name, value in whole.state_dict().items()}
    own, every = set(info.config.guided_layers), kind.guided_layers
    widths = torch.cat([torch.full((layer.width,), layer in own) for layer in every])
    inner = torch.cat([torch.full((2 * kind.kind.hidden,), layer in own) for layer in every])
    for name, value in weights.items():
        if name.startswith(("kind.scale.", "kind.to_modulation.")):
            given[name][widths] = value
        elif name.startswith("kind.to_factor_and_shift."):
            given[name][inner] = value
        else:
            given[name] = value
    return AdapterInfo(**vars(info) | {"config": kind}), given


def config_of_all(config: AdapterConfig) -> AdapterConfig:
    kind = type(config.kind)(**vars(config.kind) | {"attention_every": 1})
    return AdapterConfig(config.layers, kind, config.prompt_tokens, config.vector)


class DeepUNet(TinyUNet):
    """With stacks of three blocks."""

    unet_config = TinyUNet.unet_config | {
        "transformer_depth": [3, 3],
        "transformer_depth_middle": 3,
        "transformer_depth_output": [3] * 4,
    }


def test_in_a_unet_too():
    base, prompts = tiny(DeepUNet()), random_prompts()
    info = info_for(describe_base(base.model), hidden=8, encoder_width=8, prompt_tokens=16, rank=2, attention_every=3)
    weights = randomised(Adapter(info.config)).state_dict()
    assert 3 * len(info.config.guided_layers) == len(info.config.layers)

    def sampled_with(info: AdapterInfo, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return ksampler(apply_adapter(base, info, weights, GuidanceSettings(), source="the file"), prompts)

    whole = sampled_with(*as_of_all_blocks(info, weights))
    torch.testing.assert_close(sampled_with(info, weights), whole, rtol=1e-3, atol=1e-4)


def sampled(name: str, info: AdapterInfo, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = apply_adapter(tiny_model(name), info, weights, GuidanceSettings(), source="the file")
    prompts = Prompts(conditioning(name, "a fox"), conditioning(name, "blurry, dark"))
    return flat(ksampler(model, prompts, at=empty_latent(name, 2)))


@pytest.mark.parametrize("name", GUIDED)
def test_it_is_the_adapter_of_all_blocks_that_does_nothing_in_the_others(name):
    info, weights = adapter_of(name, attention_every=2)
    assert 0 < len(info.config.guided_layers) < len(base_of(name).layers)
    whole = sampled(name, *as_of_all_blocks(info, weights))
    torch.testing.assert_close(sampled(name, info, weights), whole, rtol=1e-3, atol=1e-4)

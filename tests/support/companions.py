"""What else a workflow may hold beside an adapter, tiny and with random weights: LoRA, ControlNet, GLIGEN, ..."""

import functools
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.modules.attention import optimized_attention
from safetensors.torch import save_file
from torch import nn

from comfyui_agd.examples.toy.model import CONTEXT_DIM, load_clip
from comfyui_agd.examples.toy.train import initialise
from comfyui_agd.tests.support.runtime import TwoWidths

CPU = torch.device("cpu")


def write_lora(path: Path, model: comfy.model_patcher.ModelPatcher, seed: int) -> Path:
    """A LoRA of rank 2 on every linear layer of the attentions, strong enough to be seen."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, layer in model.model.diffusion_model.named_modules():
        if isinstance(layer, nn.Linear) and ".attn" in name:
            key = "lora_unet_" + name.replace(".", "_")
            state[f"{key}.lora_down.weight"] = 0.1 * torch.randn(2, layer.in_features, generator=generator)
            state[f"{key}.lora_up.weight"] = 0.5 * torch.randn(layer.out_features, 2, generator=generator)
            state[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(state, path)
    return path


def _randomise(module: nn.Module, seed: int, scale: float) -> nn.Module:
    """Random weights where ComfyUI's classes have zeros or nothing."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        initialise(module)
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=scale)
    return module.requires_grad_(False)


def control_net(seed: int = 0) -> comfy.controlnet.ControlNet:
    """A ControlNet of TwoWidths' sizes, whose output convolutions are not zero."""
    config = {key: value for key, value in TwoWidths.unet_config.items() if key != "out_channels"}
    model = comfy.cldm.cldm.ControlNet(**config, **TwoWidths.unet_extra_config, hint_channels=3)
    return comfy.controlnet.ControlNet(_randomise(model, seed, 0.1), load_device=CPU)


@functools.cache
def clip() -> comfy.sd.CLIP:
    return load_clip()


@functools.cache
def gligen() -> comfy.model_patcher.ModelPatcher:
    """One gated attention per transformer block of TwoWidths, in the order of evaluation, all gates open."""
    modules = [comfy.gligen.GatedSelfAttentionDense(64, CONTEXT_DIM, 2, 32) for _ in range(4)]
    model = comfy.gligen.Gligen(modules, comfy.gligen.PositionNet(CONTEXT_DIM, CONTEXT_DIM), CONTEXT_DIM)
    _randomise(model, 0, 1.0)
    return comfy.model_patcher.CoreModelPatcher(model, load_device=CPU, offload_device=CPU)


class ImagePrompt:
    """An attn2 replacement as IP-Adapter packs install it: beside the prompt's attention one to image tokens, which
    differ between positive and negative rows. `seen` are the kinds of rows that it was called for."""

    def __init__(self):
        self.seen: set[int] = set()

    def __call__(self, q, k, v, extra_options):
        kinds, heads = extra_options["cond_or_uncond"], extra_options["n_heads"]
        self.seen.update(kinds)
        generator = torch.Generator().manual_seed(q.shape[-1])
        tokens = torch.randn(2, 4, 2 * q.shape[-1], generator=generator).to(q)
        image_k, image_v = tokens[kinds].repeat_interleave(q.shape[0] // len(kinds), dim=0).chunk(2, dim=-1)
        out = optimized_attention(q, k, v, heads)
        return out + 0.5 * optimized_attention(q, image_k, image_v, heads)

    def install(self, model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
        clone = model.clone()
        for block in (("input", 3), ("middle", 0), ("output", 0)):
            clone.set_model_attn2_replace(self, *block)
        return clone

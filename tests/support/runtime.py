"""The real ComfyUI runtime on the CPU: tiny random models, and samplers run as ComfyUI's nodes run them."""

from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import comfy.utils
import comfyui_version
import nodes
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.comfyui.counting import counted
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.messages import log_warning
from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings
from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free
from comfyui_agd.examples.toy.model import ToyConfig
from comfyui_agd.examples.toy.train import initialise

comfy.utils.PROGRESS_BAR_ENABLED = False
CFG = 5.0
STEPS = 4
FEWEST_STEPS = 1  # of a sampling, for tests of what needs some to begin with


def is_from(version: str) -> bool:
    """Whether this is that release of ComfyUI or a newer one."""
    here, there = (tuple(map(int, v.split("."))) for v in (comfyui_version.__version__, version))
    return here >= there


def since(version: str) -> None:
    """Skip the test on an older ComfyUI."""
    if not is_from(version):
        pytest.skip(f"ComfyUI {comfyui_version.__version__} has no such thing, {version} has")


class TinyUNet(ToyConfig):
    """The toy's architecture at the smallest widths, with random weights."""

    unet_config = {**ToyConfig.unet_config, "model_channels": 32, "channel_mult": (1, 1)}


class TwoWidths(ToyConfig):
    """Attention at the wider of two widths, which is where nodes such as FreeU work."""

    unet_config = {**ToyConfig.unet_config, "model_channels": 32}
    unet_config |= {"transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]}


class TinyXL(comfy.supported_models.SDXL):
    """SDXL's own class, with its pooled `y`, at the smallest widths."""

    unet_config = {**TinyUNet.unet_config, "in_channels": 4, "out_channels": 4, "num_classes": "sequential"}
    unet_config |= {"adm_in_channels": 2816}
    unet_extra_config = ToyConfig.unet_extra_config

    def __init__(self):
        super().__init__(self.unet_config)


def tiny(config, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = config.get_model({})
        initialise(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(model, load_device=cpu, offload_device=cpu)


def in_dtype(base, kind, stored: torch.dtype, computed: torch.dtype | None = None):
    """`base`, made of the class `kind`, with its weights stored in one dtype and computed in another."""
    config = kind()
    config.unet_config = {**config.unet_config}
    config.set_inference_dtype(stored, computed)
    model = config.get_model({})
    model.diffusion_model.load_state_dict(base.model.diffusion_model.state_dict())
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(model, load_device=cpu, offload_device=cpu)


@dataclass
class Prompts:
    positive: list
    negative: list


def random_prompts(context_dim: int = 128, pooled: int = 128, lengths=(16, 16), seed: int = 5) -> Prompts:
    generator = torch.Generator().manual_seed(seed)

    def entry(length: int) -> list:
        cond = torch.randn(1, length, context_dim, generator=generator)
        return [[cond, {"pooled_output": torch.randn(1, pooled, generator=generator)}]]

    return Prompts(entry(lengths[0]), entry(lengths[1]))


def patched(model, file, *, notify=log_warning, **settings):
    """With the adapter in `file`."""
    adapter = adapter_file.load_weights(file)
    return apply_adapter(model, *adapter, GuidanceSettings(**settings), source=str(file), notify=notify)


def training_free(model, *, notify=log_warning, **settings):
    return apply_training_free(model, GuidanceSettings(**settings), notify=notify)


def latent(batch: int = 1, height: int = 8, width: int = 8, channels: int = 12) -> dict:
    return {"samples": torch.zeros(batch, channels, height, width)}


@torch.inference_mode()
def ksampler(model, prompts: Prompts, *, cfg: float = CFG, sampler: str = "euler", at: dict | None = None, **options):
    settings = {"scheduler": "normal", "denoise": 1.0, "steps": STEPS, **options}
    steps = max(settings["steps"], FEWEST_STEPS)
    return nodes.KSampler().sample(
        model, 7, steps, cfg, sampler, settings["scheduler"], prompts.positive, prompts.negative,
        at or latent(), denoise=settings["denoise"],
    )[0]["samples"]  # fmt: skip


@torch.inference_mode()
def ksampler_advanced(model, prompts: Prompts, at: dict, start: int = 0, end: int = STEPS, **options):
    """Steps `start` to `end` of STEPS, or as large a part of FEWEST_STEPS. By default the first part adds the noise and
    the last one leaves none."""
    settings = {"add_noise": start == 0, "leftover": end < STEPS, "cfg": CFG, **options}
    add_noise, leftover = ("enable" if settings[key] else "disable" for key in ("add_noise", "leftover"))
    steps = max(STEPS, FEWEST_STEPS)
    start, end = (part * steps // STEPS for part in (start, end))
    return nodes.KSamplerAdvanced().sample(
        model, add_noise, 7, steps, settings["cfg"], "euler", "normal", prompts.positive, prompts.negative, at,
        start, end, leftover,
    )[0]  # fmt: skip


@torch.inference_mode()
def custom_sampler(model, prompts: Prompts, guider: str, at: dict | None = None, cfg: float = CFG):
    """SamplerCustom, or SamplerCustomAdvanced with the guider of that name."""
    sampler = comfy.samplers.sampler_object("euler")
    steps = max(STEPS, FEWEST_STEPS)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    at = at or latent()
    if guider == "SamplerCustom":
        positive, negative = prompts.positive, prompts.negative
        node = custom.SamplerCustom
        return node.execute(model, True, 7, cfg, positive, negative, sampler, sigmas, at).args[0]["samples"]
    if guider == "CFGGuider":
        chosen = custom.CFGGuider.execute(model, prompts.positive, prompts.negative, cfg).args[0]
    else:
        chosen = custom.BasicGuider.execute(model, prompts.positive).args[0]
    noise = custom.RandomNoise.execute(7).args[0]
    return custom.SamplerCustomAdvanced.execute(noise, chosen, sampler, sigmas, at).args[0]["samples"]


def rows_of(model, run, *args, **kwargs) -> list[int]:
    """The batch sizes of the diffusion model's calls while `run` samples `model`."""
    model, counter = counted(model)
    run(model, *args, **kwargs)
    return counter.rows

"""Whole samples as ComfyUI's KSampler makes them, unguided, with CFG and with an adapter; what they cost is counted."""

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.nested_tensor
import comfy.sample
import torch
from comfy.patcher_extension import WrappersMP

from ...adapter_file import AdapterInfo
from ...guidance import GuidanceRule
from ..backbones import backbone_of
from ..counting import counted
from ..guided_step import KEY
from ..sampling.apply import apply_adapter
from ..sampling.schedule import percent_of
from ..sampling.settings import GuidanceSettings
from .text_encoder import EncodedPrompt


def guided_by(model: comfy.model_patcher.ModelPatcher, rule: GuidanceRule) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` whose samplers combine both predictions by `rule` instead of plain CFG."""

    def combine(args: dict) -> torch.Tensor:
        x, sigma, cond = args["input"], args["sigma"], args["cond_denoised"]
        omega = torch.full((len(x),), float(args["cond_scale"]), device=x.device)
        return x - rule(x, sigma, cond, args["uncond_denoised"], omega)  # ComfyUI wants the noise

    clone = model.clone()
    clone.set_model_sampler_cfg_function(combine)
    return clone


class ComfySampler:
    """Implements `training.assess.Sampler` for one MODEL and one adapter. `notes`: what the adapter's user should know.

    Raises `ValueError` for a model that has an adapter already, `AdapterFileError` where the adapter doesn't fit it.
    """

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        info: AdapterInfo,
        weights: dict[str, torch.Tensor],
        *,
        source: str,
        rule: GuidanceRule = GuidanceRule(),
        noise_levels: tuple[float, float] = (0.0, 0.0),
    ):
        """`noise_levels`: the adapter guides from the first one up and below the second (0: all), elsewhere the samples
        "agd" have CFG, too.
        """
        if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
            raise ValueError("This model has an AGD adapter already; give it without one, to compare with its own CFG.")
        self.notes: list[str] = []
        settings = _guided_at(model, *noise_levels)
        adapted = apply_adapter(model, info, weights, settings, source=source, notify=self.notes.append)
        teacher = model if rule.name == "cfg" else guided_by(model, rule)
        self._models = {
            "unguided": counted(model),
            "guided": counted(teacher),
            "agd": counted(adapted),
        }

    @torch.no_grad()
    def __call__(
        self,
        method: str,
        noise: torch.Tensor,
        prompts: tuple[EncodedPrompt, EncodedPrompt],
        *,
        omega: float,
        steps: int,
        progress: Callable[[], None],
    ) -> tuple[torch.Tensor, int]:
        """A latent (1, c, h, w) as `ComfyModel.picture` takes it, and the evaluations (rows) that it took.

        `method`: "unguided", "guided" or "agd"; `noise`: (1, c, h, w); `prompts`: positive and negative; `progress` is
        called at every step.
        """
        model, counter = self._models[method]
        counter.clear()
        positive, negative = map(_conditioning, prompts)
        backbone = backbone_of(model.model)
        latent = comfy.sample.sample(
            model,
            _as_samples(backbone.split(noise)),
            steps,
            1.0 if method == "unguided" else omega,
            "euler",
            "normal",
            positive,
            negative,
            _as_samples(backbone.split(torch.zeros_like(noise))),
            callback=lambda step, denoised, x, steps: progress(),
            disable_pbar=True,
            seed=0,
        )
        latents = latent.unbind() if latent.is_nested else [latent]
        return model.model.process_latent_in(backbone.join(latents).float().cpu()), counter.total


def _guided_at(model: comfy.model_patcher.ModelPatcher, sigma_from: float, sigma_to: float) -> GuidanceSettings:
    """Of the steps at these noise levels."""
    schedule = model.get_model_object("model_sampling")
    return GuidanceSettings(
        start_percent=percent_of(schedule, sigma_to) if sigma_to else 0.0,
        end_percent=percent_of(schedule, sigma_from) if sigma_from else 1.0,
    )


def _as_samples(latents: list[torch.Tensor]) -> Any:
    """As a LATENT has them."""
    return comfy.nested_tensor.NestedTensor(latents) if len(latents) > 1 else latents[0]


def _conditioning(prompt: EncodedPrompt) -> list[list]:
    """An encoded prompt as CLIPTextEncode gives it."""
    return [[prompt.cond["cross_attn"], prompt.cond]]

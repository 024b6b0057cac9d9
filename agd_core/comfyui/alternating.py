"""Guidance without training in ComfyUI's samplers, for any MODEL: what AGD Adapter Loader's `training-free` does.

ComfyUI combines both predictions as it always does, so that everything that adjusts the combination has what it needs.
"""

import bisect
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..alternating import AlternatingGuidance
from .patch import KEY
from .steps import Span, once, say_in_log, with_cfg
from .two_passes import EVALUATES_BOTH, who_needs_both_evaluated

NAME = "training-free"
DESCRIPTION = (
    f"{NAME}: about one model call per step instead of two. It estimates CFG: prompt and negative take turns, and the "
    "other prediction is taken from the steps around. Both are evaluated where steps are far apart, as in schedules of "
    "eight steps or fewer, and in every second step of samplers that add much noise. On one small test model its "
    "pictures were as good as CFG's, on another they were clearly worse: compare with plain CFG at half the steps, "
    "which takes as many model calls."
)
_PARTS = 256  # of a schedule: as exactly as a position in it has to be known


@dataclass(frozen=True)
class Alternating:
    """OUTER_SAMPLE wrapper: every sampling gets an `AlternatingSampling` of its own."""

    guidance_scale: float | None
    strength: float
    span: Span
    say: Callable[[str], None]

    def __call__(self, executor, noise, latent_image, sampler, *args, **kwargs):
        # The guider's options are this sampling's own copy. Last in, so innermost: CFGOverride and the like have
        # already set the cfg that is meant for a step.
        wrappers = executor.class_obj.model_options["transformer_options"]["wrappers"]
        sampling = AlternatingSampling(self, sampler)
        wrappers.setdefault(WrappersMP.PREDICT_NOISE, {})[KEY] = [sampling]
        sampled = executor(noise, latent_image, sampler, *args, **kwargs)
        if sampling.evaluated[2] > sampling.evaluated[1]:
            self.say(
                "the steps of this sampling are far apart, so most of them evaluate both predictions and little is "
                "gained; training-free guidance wants nine steps or more."
            )
        elif sampling.guidance.doubted:
            self.say(
                "with this sampler and schedule one step tells too little of the next, so every second one evaluates "
                "both predictions: about 1.5 evaluations per step."
            )
        return sampled

    def omega(self, guider) -> float:
        omega = guider.cfg if self.guidance_scale is None else self.guidance_scale
        return 1 + self.strength * (omega - 1)


@dataclass
class AlternatingSampling:
    """PREDICT_NOISE wrapper of one sampling."""

    settings: Alternating
    sampler: comfy.samplers.Sampler
    guidance: AlternatingGuidance = field(default_factory=AlternatingGuidance)
    evaluated: Counter[int] = field(default_factory=Counter)  # evaluations of one prediction and of both, counted

    def __call__(self, executor, x, timestep, model_options={}, seed=None):
        guider = executor.class_obj
        if not self.settings.span.covers(timestep):
            return executor(x, timestep, model_options, seed)
        if why := _why_not(guider, self.sampler, model_options):
            self.settings.say(why)
            return executor(x, timestep, model_options, seed)
        with with_cfg(guider, self.settings.omega(guider)):
            if not math.isclose(guider.cfg, 1.0):
                model_options = {**model_options, EVALUATES_BOTH: self.predictions}
            return executor(x, timestep, model_options, seed)

    def predictions(self, args: dict) -> list[torch.Tensor]:
        """ComfyUI's `sampler_calc_cond_batch_function`: denoised with the prompt and with the negative."""
        model, x, sigma = args["model"], args["input"], args["sigma"]
        conds = dict(zip((True, False), args["conds"], strict=True))

        def evaluate(*turns: bool) -> list[torch.Tensor]:
            self.evaluated[len(turns)] += 1
            chosen = [conds[turn] for turn in turns]
            return comfy.samplers.calc_cond_batch(model, chosen, x, sigma, args["model_options"])

        return list(self.guidance(_position(model.model_sampling, float(sigma.flatten()[0])), evaluate))


def _why_not(guider, sampler: comfy.samplers.Sampler, model_options: dict) -> str | None:
    """Why a step is evaluated as without this node, in one sentence, or None."""
    if guider.conds.get("negative") is None:
        return (
            "training-free guidance needs a negative prompt, and this workflow gives none, so the model runs "
            "unguided; an empty text as the negative prompt is enough."
        )
    name = who_needs_both_evaluated(guider, sampler, model_options)
    return name and f"{name} needs both predictions evaluated in every step, so nothing is gained here."


def _position(model_sampling, sigma: float) -> float:
    """Where in the model's schedule: 0 is pure noise, 1 the end; the inverse of `percent_to_sigma`."""

    def less_noise(part: int) -> float:
        return -model_sampling.percent_to_sigma(part / _PARTS)

    return bisect.bisect_left(range(_PARTS), -sigma, key=less_noise) / _PARTS


def alternate(
    model: comfy.model_patcher.ModelPatcher,
    *,
    guidance_scale: float | None = None,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    notify: Callable[[str], None] = say_in_log,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model`, of any architecture, that samples with CFG at one evaluation per step.

    The arguments are those of `apply_adapter`. Raises `ValueError` for a model that has an adapter, or this already.
    """
    clone = model.clone()
    if clone.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        raise ValueError("This model has guidance of an AGD node already; training-free is for a model without.")
    if strength == 0 or start_percent >= end_percent:
        return clone
    span = Span.between(model.get_model_object("model_sampling"), start_percent, end_percent)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, Alternating(guidance_scale, strength, span, once(notify)))
    return clone

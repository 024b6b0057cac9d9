"""Sampling with guidance embedded: what AGD Adapter Loader and AGD Apply Adapter do to a MODEL."""

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..adapter import Adapter
from ..checkpoint import AdapterInfo, check_base
from ..lora import low_rank_part
from .merging import NotAsMerged, can_merge, merged_into
from .patch import KEY, Active, Broken, Negative, Step, is_compiled, managed, register, take_part, without_compile
from .sites import check_linear_layers, describe_base
from .steps import Span, once, say_in_log, with_cfg
from .two_passes import who_needs_both

# Latents of up to twice the pixels of a trained size, or down to half of them, are not worth a word.
_FAR = 2.0
# A negative prompt this much nearer to the trained unconditional than the positive one is taken for it.
_SAME = 0.25
# Adapters whose strengths sum up to more than this are hardly meant to work in the same step.
_TOGETHER = 1.25


@dataclass(frozen=True)
class Use:
    """One adapter as one node uses it. `guidance_scale` None takes omega from the guider's cfg; `lora`: what of it can
    be merged into the weights, at strength omega - 1."""

    info: AdapterInfo
    patcher: comfy.model_patcher.ModelPatcher
    guidance_scale: float | None
    strength: float
    span: Span
    lora: dict[str, torch.Tensor]
    identity: uuid.UUID = field(default_factory=uuid.uuid4)

    def omega(self, guider) -> float:
        return guider.cfg if self.guidance_scale is None else self.guidance_scale


@dataclass
class EmbeddedGuidance:
    """OUTER_SAMPLE wrapper: every sampling gets a `Sampling` of its own, so that nothing lasts longer than it does.

    `say` hears what the user should know, and tells each sentence once. `compiled`: a compiled model may run as it is.
    `merging`: samplings may have low-rank changes in the weights, for those so far kept to one omega.
    """

    uses: tuple[Use, ...]
    say: Callable[[str], None]
    compiled: bool = True
    merging: bool = True

    def __call__(self, executor, noise, latent_image, sampler, *args, **kwargs):
        guider = executor.class_obj

        def sampled(merged: float | None = None):
            # The guider's options are this sampling's own copy. Last in, so innermost: CFGOverride and the like, before
            # or after our node, have already set the cfg that is meant for a step.
            wrappers = guider.model_options["transformer_options"]["wrappers"]
            wrappers.setdefault(WrappersMP.PREDICT_NOISE, {})[KEY] = [Sampling(self, sampler, merged)]
            return executor(noise, latent_image, sampler, *args, **kwargs)

        if self._merges(guider, sampler):
            use, conds = self.uses[0], {kind: [cond.copy() for cond in own] for kind, own in guider.conds.items()}
            omega = use.omega(guider)
            try:
                with merged_into(guider, use.lora, use.strength * (omega - 1), use.identity):
                    return sampled(merged=omega)
            except NotAsMerged:
                # From the start again, with the weights as they are. ComfyUI has processed the conditions.
                self.merging, guider.conds = False, conds
        return sampled()

    def _merges(self, guider, sampler: comfy.samplers.Sampler) -> bool:
        """Whether to sample with the adapter's low-rank changes in the weights."""
        use, *others = self.uses
        if (
            others
            or not self.merging
            or not use.lora
            or not use.span.everywhere
            or math.isclose(use.omega(guider), 1.0)
        ):
            return False
        return can_merge(guider) and not who_needs_both(guider, sampler, guider.model_options)


def _prompts(conds: list[dict] | None) -> list[dict]:
    """The conditions that have a prompt. ConditioningZeroOut is nobody's prompt."""
    # Not "cross_attn": for each area of the positive ComfyUI adds a copy of it with the negative's model_conds.
    with_context = [cond for cond in conds or [] if "c_crossattn" in cond["model_conds"]]
    return [cond for cond in with_context if _context(cond).any()]


def _context(cond: dict) -> torch.Tensor:
    """Its prompt tokens (r, m, d)."""
    return cond["model_conds"]["c_crossattn"].cond


def _covers(cond: dict, timestep: torch.Tensor) -> bool:
    """Whether a condition that was given a part of the sampling has this step in it."""
    start, end = cond.get("timestep_start"), cond.get("timestep_end")
    if start is None and end is None:
        return True
    sigma = float(timestep.flatten()[0])
    return (start is None or sigma <= start) and (end is None or sigma >= end)


def _has_negative_prompt(guider, trained: torch.Tensor) -> bool:
    """Whether the negative is another than the unconditional of the training, whose mean token `trained` is."""
    positive, negative = (
        [_context(cond).float().mean(dim=(0, 1)).cpu() for cond in _prompts(guider.conds.get(kind))]
        for kind in ("positive", "negative")
    )
    if not positive or not negative:
        return False
    usual = min(float((mean - trained).norm()) for mean in positive)
    return max(float((mean - trained).norm()) for mean in negative) > _SAME * usual


@dataclass
class Sampling:
    """PREDICT_NOISE wrapper of one sampling: which omega a step gets, and whether adapters take part in it at all.

    `merged`: the omega for which the weights have the only adapter's low-rank changes in them.
    """

    embedded: EmbeddedGuidance
    sampler: comfy.samplers.Sampler
    merged: float | None = None
    looked: bool = False
    tensors: dict[float, torch.Tensor] = field(default_factory=dict)
    prompts: list[dict] | None = None  # of the negative
    negatives: dict[int, Negative] = field(default_factory=dict)  # by what their context is

    def __call__(self, executor, x, timestep, model_options={}, seed=None):
        guider = executor.class_obj
        uses = [use for use in self.embedded.uses if use.span.covers(timestep)]
        if not uses:
            return executor(x, timestep, model_options, seed)
        needs_both = who_needs_both(guider, self.sampler, model_options)
        omegas = [use.omega(guider) for use in uses]
        if self.merged is not None and (needs_both or omegas != [self.merged]):
            raise NotAsMerged
        if needs_both:
            self.embedded.say(
                f"{needs_both} needs the unconditional prediction, so every step takes two passes all the same; the "
                "model's own cfg is used instead of the adapter, and nothing is gained here."
            )
            with with_cfg(guider, omegas[-1]):
                return executor(x, timestep, model_options, seed)
        guiding = [(use, omega) for use, omega in zip(uses, omegas, strict=True) if not math.isclose(omega, 1.0)]
        hears_negative = any(use.patcher.model.uses_negative for use, _ in guiding)
        away_from = self._away_from(guider, timestep) if hears_negative else ()
        if not away_from:
            guiding = [(use, omega) for use, omega in guiding if self._needs_no_negative(use)]
        with with_cfg(guider, 1.0):
            if not guiding:
                return executor(x, timestep, model_options, seed)
            if not self.looked:
                self.looked = True
                self._look_at(guider, guiding, x)
            step = Step(tuple(self._active(use, omega, x, away_from) for use, omega in guiding))
            return self._one_pass(executor, x, timestep, model_options, seed, step)

    def _look_at(self, guider, guiding: list[tuple[Use, float]], x: torch.Tensor) -> None:
        """Say, once per sampling at its first step, what may surprise."""
        height, width = x.shape[-2:]
        for use, _ in guiding:
            trained = use.info.resolutions
            ratios = [height * width / (h * w) for h, w in trained]
            if ratios and not any(1 / _FAR <= ratio <= _FAR for ratio in ratios):
                sizes = ", ".join(f"{w}x{h}" for h, w in trained)
                self.embedded.say(
                    f"this latent is {width}x{height}, far from what the adapter was trained at, {sizes}."
                )
            if use.info.negative_mode == "ignored" and _has_negative_prompt(
                guider, use.patcher.model.unconditional.float().mean(0).cpu()
            ):
                self.embedded.say(
                    "the negative prompt has no effect with this adapter: it learned guidance away from the "
                    f"{use.info.unconditional}."
                )
        if len(guiding) > 1 and sum(use.strength for use, _ in guiding) > _TOGETHER:
            self.embedded.say(
                f"{len(guiding)} adapters work in the same step and their guidance adds up; give them strengths that "
                "sum up to 1, or parts of the sampling that don't overlap."
            )

    def _away_from(self, guider, timestep: torch.Tensor) -> tuple[Negative, ...]:
        """The negative prompts of this step, each with its keys and values from earlier steps.

        Several count by their strength. Areas don't matter: guidance away from a prompt is meant everywhere.
        """
        if self.prompts is None:
            self.prompts = _prompts(guider.conds.get("negative"))
        strengths: dict[int, float] = {}
        for cond in self.prompts:
            if _covers(cond, timestep):
                context = _context(cond)
                self.negatives.setdefault(id(context), Negative(context))
                strengths[id(context)] = max(strengths.get(id(context), 0.0), cond.get("strength", 1.0))
        for key, strength in strengths.items():
            self.negatives[key].share = strength / sum(strengths.values())
        return tuple(self.negatives[key] for key in strengths)

    def _needs_no_negative(self, use: Use) -> bool:
        if use.info.negative_mode == "used" and not use.info.unconditional:
            self.embedded.say(
                "guidance without training needs a negative prompt, and this workflow gives none, so the model runs "
                "unguided; an empty text as the negative prompt is enough."
            )
            return False
        return True

    def _trained_unconditional(self, adapter: Adapter) -> tuple[Negative, ...]:
        context = adapter.unconditional
        return (self.negatives.setdefault(id(context), Negative(context[None])),)

    def _active(self, use: Use, omega: float, x: torch.Tensor, away_from: tuple[Negative, ...]) -> Active:
        low, high = use.info.omega_range
        if not low <= omega <= high:
            self.embedded.say(f"guidance {omega:g} lies outside the adapter's trained range, {low:g} to {high:g}.")
        adapter = use.patcher.model
        negatives = (away_from or self._trained_unconditional(adapter)) if adapter.uses_negative else ()
        omega, strength = self._on_device(omega, x), self._on_device(use.strength, x)
        return Active(adapter, omega, strength, negatives, merged=self.merged is not None)

    def _on_device(self, value: float, x: torch.Tensor) -> torch.Tensor:
        """(1,) fp32. Made by the device itself: sending it there would wait for all that is queued before."""
        if value not in self.tensors:
            self.tensors[value] = torch.full((1,), value, device=x.device, dtype=torch.float32)
        return self.tensors[value]

    def _one_pass(self, executor, x, timestep, model_options: dict, seed, step: Step) -> torch.Tensor:
        options = take_part(model_options.get("transformer_options", {}), step)
        unseen = step.changes_linears and is_compiled(options)
        if unseen:
            self.embedded.say(
                "torch.compile doesn't see what an adapter of low rank does inside of the model's layers; with the "
                "adapter the model runs uncompiled."
            )
        if self.embedded.compiled and not unseen:
            try:
                return executor(x, timestep, {**model_options, "transformer_options": options}, seed)
            except Broken:
                self.embedded.compiled = False
                # What has just been compiled would run for the model without adapters, too.
                torch.compiler.reset()
                self.embedded.say(
                    "torch.compile breaks this model into several graphs, in which patches don't work rightly; with "
                    "the adapter the model runs uncompiled."
                )
        return executor(x, timestep, {**model_options, "transformer_options": without_compile(options)}, seed)


def apply_adapter(
    model: comfy.model_patcher.ModelPatcher,
    info: AdapterInfo,
    state: dict[str, torch.Tensor],
    *,
    source: str,
    guidance_scale: float | None = None,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    notify: Callable[[str], None] = say_in_log,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` that samples with guidance embedded, one evaluation per step.

    `state` are the adapter's weights; `guidance_scale` None takes omega from the guider's cfg. At strength 0, and for
    steps outside [start_percent, end_percent], the model runs as if there were no adapter; on a model that has
    adapters already, this one's residuals are added to theirs. Raises `AdapterFileError` where the adapter was made
    for another base or its weights can't be used; `source` names it there. Raises `UnsupportedModel` where the base's
    linear layers are not those that the adapter changes.
    """
    sampling = model.get_model_object("model_sampling")
    check_base(info, describe_base(model.model, sampling), source)
    if info.config.changes_linears:
        check_linear_layers(model.model.diffusion_model, info.config.sites)
    clone = model.clone()
    if strength == 0 or start_percent >= end_percent:
        return clone
    use = Use(
        info,
        managed(info, state, model, source),
        guidance_scale,
        strength,
        Span.between(sampling, start_percent, end_percent),
        # Copied: files may be mapped.
        lora={k: v.clone() for k, v in low_rank_part(info, state).items()} if info.config.merges else {},
    )
    others = clone.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    if not all(isinstance(other, EmbeddedGuidance) for other in others):
        raise ValueError(
            "This model has training-free guidance of an AGD node already; an adapter is for a model without."
        )
    before = [use for embedded in others for use in embedded.uses]
    embedded = EmbeddedGuidance((*before, use), once(notify))
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, embedded)
    clone.set_additional_models(KEY, [use.patcher for use in embedded.uses])
    register(clone)
    return clone

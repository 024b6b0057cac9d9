"""Sampling with guidance embedded: what AGD Adapter Loader and AGD Apply Adapter do to a MODEL."""

import math
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, Sampler

from ...adapter_file import AdapterFileError, AdapterInfo, check_base
from ...lora import low_rank_part
from ..backbones import backbone_of, check_linears, describe_base
from ..evaluation import register
from ..sampling.compile_guard import GraphBreak, is_compiled, without_compile
from ..sampling.managed_weights import managed
from ..step import KEY, ActiveAdapter, GuidedStep
from .merging import can_merge, merged_into
from .negatives import NegativePrompts, Share, area_of, mean_token, with_context
from .steps import BeginAgain, CfgOverride, Itself, Span, as_scale, copied, name_of_guider, once, say_in_log
from .uncond_consumers import PRE_CFG, Given, name_of, names_of, post_cfg, unwatch, watch_use, who_combines

# Latents of up to twice the pixels of a trained size, or down to half of them, are not worth a word.
_FAR = 2.0
# A negative prompt this much nearer to the trained unconditional than the positive one is taken for it.
_SAME = 0.25
# Adapters whose strengths sum up to more than this are hardly meant to work in the same step.
_TOGETHER = 1.25


@dataclass(frozen=True)
class Use:
    """One adapter as one node uses it. `guidance_scale` None takes omega from the sampler's cfg; `lora`: what of it can
    be merged into the weights, at strength omega - 1; `source`: its name in messages."""

    info: AdapterInfo
    patcher: comfy.model_patcher.ModelPatcher
    guidance_scale: float | None
    strength: float
    start_percent: float
    end_percent: float
    lora: dict[str, torch.Tensor]
    source: str
    identity: uuid.UUID = field(default_factory=uuid.uuid4)


class NotGuided(BeginAgain):
    """A sampling can't be guided by adapters; `why`: in a few words, for the user."""

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why


class Merge(BeginAgain):
    """A guided step has come, and its low-rank changes can be in the weights."""


@dataclass
class EmbeddedGuidance(Itself):
    """OUTER_SAMPLE wrapper: every sampling gets a `Sampling` of its own, so that nothing lasts longer than it does.

    `say` is given what the user should know, and tells each sentence once. `compiled`: a compiled model may run as it
    is. `merging`: samplings may have low-rank changes in the weights, for those so far kept to one omega. Those by
    `guiders` and functions of other nodes that are known to ask for guided steps, and for nothing else, have them from
    their beginning.
    """

    uses: tuple[Use, ...]
    say: Callable[[str], None]
    compiled: bool = True
    merging: bool = True
    guiders: set[tuple] = field(default_factory=set)

    def __call__(self, executor, noise, latent_image, sampler, *args, **kwargs):
        guider = executor.class_obj
        spans = self._checked(guider)
        conds = copied(guider.conds)
        others = list(guider.model_options.get(PRE_CFG, []))
        name = who_combines(sampler, guider.model_options)
        not_guided = name and f"{name} needs both predictions"
        mergeable = None if not_guided else self._omega_to_merge(guider, spans)
        asking = (type(guider), *(name_of(function, sampler) for function in post_cfg(guider.model_options)))
        merged = mergeable if asking in self.guiders else None
        if asking[1:] and not merged:
            mergeable = None  # what they use is seen in one sampling with the base's own weights
        while True:
            sampling = Sampling(self, guider, sampler, spans, not_guided, mergeable, merged)
            sampling.install(others)
            try:
                with self._merged(guider, merged):
                    sampled = executor(noise, latent_image, sampler, *args, **kwargs)
                sampling.finish()
            except Merge:
                self.guiders.add(asking)
                merged = mergeable
            except NotGuided as error:
                not_guided, mergeable, merged = error.why, None, None
            except BeginAgain:
                self.merging, mergeable, merged = False, None, None
            else:
                if sampling.guided:
                    self.guiders.add(asking)
                return sampled
            guider.conds, conds = conds, copied(conds)  # ComfyUI has processed them

    def _checked(self, guider: CFGGuider) -> list[Span]:
        """The part of the sampling that each use is for. Nodes behind the loader may have changed what a model is.

        Raises `AdapterFileError`.
        """
        model = guider.model_patcher.model
        sampling, cast = (guider.model_patcher.get_model_object(n) for n in ("model_sampling", "manual_cast_dtype"))
        for use in self.uses:
            check_base(use.info, describe_base(model, sampling), use.source)
            _check_range(use, cast or model.get_dtype())
        return [Span.between(sampling, use.start_percent, use.end_percent) for use in self.uses]

    def _omega_to_merge(self, guider: CFGGuider, spans: list[Span]) -> float | None:
        """For which omega to sample with the adapter's low-rank changes in the weights, or None."""
        use = self.uses[0]
        omega = as_scale(guider.cfg) if use.guidance_scale is None else use.guidance_scale
        alone = len(self.uses) == 1 and spans[0].everywhere
        if not (self.merging and use.lora and alone) or omega is None or math.isclose(omega, 1.0):
            return None
        return omega if can_merge(guider, use.lora) else None

    def _merged(self, guider: CFGGuider, omega: float | None):
        if omega is None:
            return nullcontext()
        use = self.uses[0]
        return merged_into(guider, use.lora, use.strength * (omega - 1), use.identity)


def _check_range(use: Use, dtype: torch.dtype) -> None:
    """Raises `AdapterFileError` where the model computes in a dtype that the adapter's weights are too large for."""
    weights = use.patcher.model.state_dict().values()
    largest = torch.finfo(dtype).max
    if any(torch.finfo(w.dtype).max > largest and not w.to(dtype).isfinite().all() for w in weights):
        raise AdapterFileError(
            f"Weights of the adapter {use.source} are too large for {dtype}, in which this model computes behind the "
            "node: run it in bf16 or fp32, or train the adapter again."
        )


def _has_negative_prompt(guider: CFGGuider, trained: torch.Tensor) -> bool:
    """Whether the negative is another than the unconditional of the training, whose mean token `trained` is."""
    positive, negative = (
        [mean_token(cond) for cond in with_context(guider.conds.get(kind))] for kind in ("positive", "negative")
    )
    if not positive or not negative:
        return False
    usual = min(float((mean - trained).norm()) for mean in positive)
    return max(float((mean - trained).norm()) for mean in negative) > _SAME * usual


@dataclass
class Sampling(Itself):
    """One sampling: where ComfyUI evaluates both conditions, both get the one guided prediction.

    So every combination of the two, by whatever scale, gives the guided prediction, and it is one evaluation whoever
    asks for it: any guider, a pack's own `sampling_function`, each of the context windows. `not_guided`: why adapters
    have no part in it, such as a node that works on the unconditional prediction itself; `mergeable`: the omega for
    which the weights can have the only adapter's low-rank changes in them, `merged`: for which they have.
    """

    embedded: EmbeddedGuidance
    guider: CFGGuider
    sampler: Sampler
    spans: list[Span]
    not_guided: str | None
    mergeable: float | None
    merged: float | None
    scale: float | None = None  # of the combination, where that isn't the guider's cfg
    presumed: float | None = None  # the scale that the last prediction for both was made for
    verify: bool = False  # whether it is still to be compared with the one of the combination that follows
    at: torch.Tensor | None = None  # sigma of the step in which both were asked for last
    found: str | None = None  # why it can't be guided, should another node have caught what tells it
    step: GuidedStep | None = None  # the one that is being evaluated, for the hooks
    called: bool = False
    plain: bool = False  # evaluating as the base does, because that was asked for
    guided: bool = False
    looked: bool = False
    noticed: tuple | None = None  # in its first guided step, to be told
    unknown: bool = False  # by which scale both predictions are combined
    more: int = 0  # evaluations of others since one of their functions has returned
    others: bool = False  # something else than both was evaluated, to be combined in a way that isn't known
    tensors: dict[float, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.negatives = NegativePrompts(self.guider)

    def install(self, pre_cfg: list[Callable]) -> None:
        """Into the guider's options, which are this sampling's own copy; `pre_cfg`: other nodes' functions there."""
        options = self.guider.model_options
        inner = options["transformer_options"]
        ours = [] if self.not_guided else [self]
        # Last in, so innermost: what others do to conditions, to the cfg of a step, or to both predictions is done.
        inner["wrappers"].setdefault(WrappersMP.CALC_COND_BATCH, {})[KEY] = [s.calc_cond_batch for s in ours]
        # Without a negative ComfyUI has zeros for the unconditional, with which no cfg but 1 makes sense.
        overrides = [CfgOverride(self._cfg)] if self.guider.conds.get("negative") else []
        inner["wrappers"].setdefault(WrappersMP.PREDICT_NOISE, {})[KEY] = overrides
        inner[KEY] = self
        options[PRE_CFG] = [s.check_scale for s in ours] + pre_cfg
        unwatch(options)
        if self.not_guided:
            self.embedded.say(
                f"No speed-up: {self.not_guided}. Every step takes two evaluations, with the model's own cfg instead "
                "of the adapter, as without this node. For one, do without what is named."
            )

    def finish(self) -> None:
        """Say, when it is over, where the adapter had no part in it; or begin again."""
        self._combined()
        self._not_caught()
        self._tell()
        if not self.not_guided and not self.guided and (self.others or self.unknown or not self.called):
            self.embedded.say(
                f"No part in this sampling: {name_of_guider(self.guider)} evaluates the prompts, or combines them, in "
                "its own way. The picture is the model's own, as without this node."
            )

    def _cfg(self, cfg: float, timestep: torch.Tensor) -> float:
        """What ComfyUI is to take for the cfg of a step, so that it asks for both predictions."""
        scales = [use.guidance_scale for use in self._uses(timestep) if use.guidance_scale is not None]
        return scales[-1] if scales else cfg

    def _uses(self, timestep: torch.Tensor) -> list[Use]:
        return [use for use, span in zip(self.embedded.uses, self.spans, strict=True) if span.covers(timestep)]

    def calc_cond_batch(self, executor, model, conds, x, timestep, model_options):
        """CALC_COND_BATCH wrapper: conditions, latents x (b, c, h, w), sigma (b,) -> their predictions (b, c, h, w)."""
        given = (model, conds, x, timestep, model_options)
        uses, self.called = self._uses(timestep), True
        self._not_caught()
        if not uses or self.not_guided:
            return self._as_the_base(executor, *given)
        if not self._are_both(conds) or (conds[1] is None and self._again(timestep)):
            return self._more(executor, *given)
        if self.verify and not self._is_now(timestep):  # each window of a step asks
            self._combined()
        self.at, self.verify = timestep, any(use.guidance_scale is None for use in uses)
        if name := who_combines(self.sampler, model_options):
            self._give_up(f"{name} needs both predictions")
        self.presumed = self._scale(conds)
        omegas = self._omegas(uses)
        if self.merged is not None and omegas != [self.merged]:
            raise BeginAgain
        self.unknown = None in omegas
        unguided = not self.unknown and all(use.guidance_scale is None for use in uses) and math.isclose(omegas[0], 1.0)
        if self.others or self.unknown or unguided:
            return self._as_the_base(executor, *given)
        if self.merged is None and omegas == [self.mergeable]:
            raise Merge
        self._tell()
        self.guided = True
        watch_use(model_options, self._used, self._returned)
        prediction = self._prediction(executor, *given)
        return [prediction, prediction.clone()]  # for whoever changes one of them in place

    def _as_the_base(self, executor, *given) -> list[torch.Tensor]:
        self.plain = True
        try:
            return executor(*given)
        finally:
            self.plain = False

    def on_unguided_evaluation(self) -> None:
        """An evaluation that is no guided one: asked for, or begun by another node on its own."""
        if self.merged is not None:
            raise BeginAgain
        if not self.plain and not self.not_guided:
            self._of_others(self.guider.model_options)

    def check_scale(self, args: dict) -> list[torch.Tensor]:
        """ComfyUI's `sampler_pre_cfg_function`: evaluate again if the scale of the combination isn't the presumed."""
        scale, verify, self.verify = as_scale(args["cond_scale"]), self.verify, False
        if self.others or not verify or scale in (None, self.presumed):
            return args["conds_out"]
        self.scale = scale
        given = (args[name] for name in ("model", "conds", "input", "timestep", "model_options"))
        predictions = comfy.samplers.calc_cond_batch(*given)
        self.verify = False
        return predictions

    def _are_both(self, conds: list[list[dict] | None]) -> bool:
        """Whether these are the conditions of both predictions, or of the prompt's where no other is asked for."""
        return (
            len(conds) == 2
            and self._belong(conds[0], "positive")
            and (not conds[1] or self._belong(conds[1], "negative"))
        )

    def _belong(self, conds: list[dict] | None, kind: str) -> bool:
        own = {cond["uuid"] for cond in self.guider.conds.get(kind) or ()}
        return bool(conds) and all(cond["uuid"] in own for cond in conds)

    def _scale(self, conds: list) -> float | None:
        """By which scale both predictions will be combined, as far as is known before; see `check_scale`."""
        if conds[1] is None and self.guider.conds.get("negative"):
            return 1.0  # so ComfyUI leaves out the other
        return as_scale(self.guider.cfg) if self.scale is None else self.scale

    def _more(self, executor, model, conds, x, timestep, model_options):
        """What others evaluate: the prompt once more, otherwise, as PAG does; or conditions of their own."""
        given = (model, conds, x, timestep, model_options)
        self.more += 1
        if self._again(timestep) and not any(conds[1:]) and self._belong(conds[0], "positive"):
            prediction = self._prediction(executor, *given)
            return [prediction, *(torch.zeros_like(prediction) for _ in conds[1:])]
        self._of_others(model_options)
        return self._as_the_base(executor, *given)

    def _again(self, timestep: torch.Tensor) -> bool:
        """Whether this step has had its guided prediction."""
        return self.guided and self._is_now(timestep)

    def _is_now(self, timestep: torch.Tensor) -> bool:
        return bool(timestep.flatten()[0] == self.at.flatten()[0])

    def _combined(self) -> None:
        """By the next step both predictions should have been combined, and the scale of it have been seen."""
        if self.verify and not self.unknown:
            self.verify, self.others = False, True
            if self.guided:
                self._give_up(f"{name_of_guider(self.guider)} combines predictions in its own way")

    def _give_up(self, why: str) -> None:
        self.found = why
        raise NotGuided(why)

    def _not_caught(self) -> None:
        if self.found and not self.not_guided:
            raise NotGuided(self.found)

    def _of_others(self, model_options: dict) -> None:
        """The base's own prediction is asked for. Combined with a guided one it would be neither CFG nor guided."""
        if self.guided:
            name = names_of(post_cfg(model_options), self.sampler) or name_of_guider(self.guider)
            self._give_up(f"{name} needs both predictions")
        self.others = True

    def _used(self, given: Given) -> None:
        """Another node's function uses what a guided prediction has not. What it keeps of it is made right before."""
        if self.merged is None:
            args = given.args
            conds, sampled_at = [None, args["uncond"]], (args["input"], args["sigma"], args["model_options"])
            self.not_guided = "for this one evaluation"
            try:
                right = comfy.samplers.calc_cond_batch(args["model"], conds, *sampled_at)[1]
            finally:
                self.not_guided = None
            args["uncond_denoised"].copy_(right)
        self._give_up(f"{name_of(given.function, self.sampler)} needs both predictions")

    def _returned(self, given: Given) -> None:
        """Who has used the conditional prediction has compared it with one of its own, or with the guided one."""
        evaluated, self.more = self.more, 0
        if "cond_denoised" in given.used and not evaluated:
            self._used(given)

    def _omegas(self, uses: list[Use]) -> list[float | None]:
        return [self.presumed if use.guidance_scale is None else use.guidance_scale for use in uses]

    def _prediction(self, executor, model, conds, x, timestep, model_options) -> torch.Tensor:
        """The guided prediction (b, c, h, w) for the prompt, `conds[0]`."""
        uses = self._uses(timestep)
        guiding = [(use, o) for use, o in zip(uses, self._omegas(uses), strict=True) if not math.isclose(o, 1.0)]
        shares = ()
        if any(use.patcher.model.uses_negative for use, _ in guiding):
            unwanted = conds[1] if any(conds[1:]) else self.guider.conds.get("negative")
            shares = self.negatives.shares(model, unwanted, x, timestep, model_options)
        guiding = [(use, omega) for use, omega in guiding if shares or self._needs_no_negative(use)]
        if not guiding:
            return self._as_the_base(executor, model, conds[:1], x, timestep, model_options)[0]
        areas = {}
        if any(share.weight is not None for share in shares):
            areas = {cond["uuid"]: area_of(cond, x, timestep) for cond in conds[0]}
        step = GuidedStep(tuple(self._active(use, omega, model, x, shares) for use, omega in guiding), areas)
        self.step = step
        try:
            prediction = self._compiled_or_not(executor, model, conds[:1], x, timestep, model_options)[0]
        finally:
            self.step = None
        if not self.looked:  # later a step cache may leave it out
            self.looked = True
            if not step.visited and (step.changes_linears or step.at_attention):
                self._give_up("another node evaluates the model without a place for adapters")
            self.noticed = guiding, x.shape[-2:], step
        return prediction

    def _tell(self) -> None:
        """What was noticed in the first guided step, once it is sure that it is one."""
        noticed, self.noticed = self.noticed, None
        if noticed is not None:
            self._look_at(*noticed)

    def _compiled_or_not(self, executor, model, conds, x, timestep, model_options) -> list[torch.Tensor]:
        options = model_options["transformer_options"]
        unseen = self.step.changes_linears and is_compiled(options)
        if unseen:
            self.embedded.say(
                "Runs uncompiled: torch.compile doesn't see what an adapter of low rank does inside the model's layers."
            )
        if self.embedded.compiled and not unseen:
            try:
                return executor(model, conds, x, timestep, model_options)
            except GraphBreak:
                self.embedded.compiled = False
                # What has just been compiled would run for the model without adapters, too.
                torch.compiler.reset()
                self.embedded.say(
                    "Runs uncompiled: torch.compile breaks this model into several graphs, in which patches don't work "
                    "rightly."
                )
        if is_compiled(options):
            model_options = {**model_options, "transformer_options": without_compile(options)}
        return executor(model, conds, x, timestep, model_options)

    def _look_at(self, guiding: list[tuple[Use, float]], size: torch.Size, step: GuidedStep) -> None:
        """Say what may surprise of a sampling of latents of that `size` (h, w)."""
        height, width = size
        for use, omega in guiding:
            self._say_if_outside(use, omega)
            trained = use.info.resolutions
            ratios = [height * width / (h * w) for h, w in trained]
            if ratios and not any(1 / _FAR <= ratio <= _FAR for ratio in ratios):
                sizes = ", ".join(f"{w}x{h}" for h, w in trained)
                self.embedded.say(f"Latent {width}x{height} is far from what the adapter was trained at, {sizes}.")
            if use.info.negative_mode == "ignored" and _has_negative_prompt(
                self.guider, use.patcher.model.unconditional.float().mean(0).cpu()
            ):
                self.embedded.say(
                    "The negative prompt has no effect with this adapter: it learned guidance away from the "
                    f"{use.info.unconditional}."
                )
        if len(guiding) > 1 and sum(use.strength for use, _ in guiding) > _TOGETHER:
            self.embedded.say(
                f"The guidance of {len(guiding)} adapters adds up in the same step; give them strengths that sum up to "
                "1, or parts of the sampling that don't overlap."
            )
        missing = set(step.layer_names()) - set(step.visited)
        if missing and step.at_attention:
            self.embedded.say(
                f"Guided in part: {len(missing)} of {len(step.layer_names())} attention layers were skipped, or "
                "replaced by another node in a way that leaves no place for adapters."
            )

    def _say_if_outside(self, use: Use, omega: float) -> None:
        low, high = use.info.omega_range
        if not low <= omega <= high:
            self.embedded.say(f"Guidance {omega:g} lies outside the adapter's trained range, {low:g} to {high:g}.")

    def _needs_no_negative(self, use: Use) -> bool:
        if use.info.negative_mode == "used" and not use.info.unconditional:
            self.embedded.say(
                "Unguided: guidance without training needs a negative prompt, and this workflow gives none. An empty "
                "text as the negative prompt is enough."
            )
            return False
        return True

    def _active(self, use: Use, omega: float, model, x: torch.Tensor, shares: tuple[Share, ...]) -> ActiveAdapter:
        if self.looked:
            self._say_if_outside(use, omega)
        adapter = use.patcher.model
        if not adapter.uses_negative:
            shares = ()
        elif not shares:
            shares = self.negatives.trained(model, adapter.unconditional, x)
        omega, strength = self._on_device(omega, x), self._on_device(use.strength, x)
        return ActiveAdapter(adapter, omega, strength, shares, merged=self.merged is not None)

    def _on_device(self, value: float, x: torch.Tensor) -> torch.Tensor:
        """(1,) fp32. Made by the device itself: sending it there would wait for all that is queued before."""
        if value not in self.tensors:
            self.tensors[value] = torch.full((1,), value, device=x.device, dtype=torch.float32)
        return self.tensors[value]


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
    backbone = backbone_of(model.model)
    backbone.check_kind(info.config)
    check_linears(backbone, info.config)
    clone = model.clone()
    if strength == 0 or start_percent >= end_percent:
        return clone
    use = Use(
        info,
        managed(info, state, model, source),
        guidance_scale,
        strength,
        start_percent,
        end_percent,
        # Copied: files may be mapped.
        lora={k: v.clone() for k, v in low_rank_part(info, state).items()} if info.config.kind.merges else {},
        source=source,
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

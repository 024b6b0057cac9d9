"""Guidance without training in ComfyUI's samplers, for any MODEL: what AGD Adapter Loader's `training-free` does.

ComfyUI combines both predictions as it always does, so that everything that adjusts the combination has what it needs.
What was evaluated is kept with its noise level and conditions, and estimates are made from one step to the next only.
Where another node needs a prediction of this very step, or leaves evaluations out, that one is evaluated every time.
"""

import bisect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, Sampler
from torch import nn

from ...alternating import AlternatingGuidance
from ..sampling.compile_guard import is_compiled
from ..step import KEY
from .negatives import covers
from .steps import BeginAgain, CfgOverride, Itself, Span, copied, name_of_guider, once, say_in_log
from .uncond_consumers import (
    EVALUATES_BOTH,
    PRE_CFG,
    Given,
    asks_for_both,
    name_of,
    names_of,
    post_cfg,
    unwatch,
    watch_use,
    who_asks_for_both,
)

NAME = "training-free"
DESCRIPTION = (
    f"{NAME}: about one model call per step instead of two. It estimates CFG: prompt and negative take turns, and the "
    "other prediction is taken from the steps around. Both are evaluated where steps are far apart, as in schedules of "
    "eight steps or fewer, and in every second step of samplers that add much noise. On one small test model its "
    "pictures were as good as CFG's, on another they were clearly worse: compare with plain CFG at half the steps, "
    "which takes as many model calls."
)
_MOST, _MANY = 0.7, 0.3  # of the steps, in which both are evaluated
_PARTS = 256  # of a schedule: as exactly as a position in it has to be known


class EvaluateBoth(BeginAgain):
    """A sampling has to evaluate both predictions in every step."""


@dataclass(frozen=True)
class Alternating(Itself):
    """OUTER_SAMPLE wrapper: every sampling gets an `AlternatingSampling` of its own."""

    guidance_scale: float | None
    strength: float
    start_percent: float
    end_percent: float
    say: Callable[[str], None]

    def __call__(self, executor, noise, latent_image, sampler, *args, **kwargs):
        guider, both = executor.class_obj, False
        model = guider.model_patcher
        span = Span.between(model.get_model_object("model_sampling"), self.start_percent, self.end_percent)
        conds = copied(guider.conds)
        if other := guider.model_options.get(EVALUATES_BOTH):
            self.say(f"No speed-up: {name_of(other, sampler)} evaluates both predictions in its own way.")
            return executor(noise, latent_image, sampler, *args, **kwargs)
        while True:
            sampling = AlternatingSampling(self, guider, sampler, span, both)
            sampling.install()
            try:
                with _noted_blocks(model.model.diffusion_model, sampling.blocks, guider.model_options):
                    sampled = executor(noise, latent_image, sampler, *args, **kwargs)
                sampling.finish()
            except EvaluateBoth:
                both, guider.conds, conds = True, conds, copied(conds)  # ComfyUI has processed them
            else:
                return sampled
            finally:
                sampling.forget()

    @property
    def overrides(self) -> bool:
        """Whether it takes another scale than the sampler's cfg."""
        return self.guidance_scale is not None or self.strength != 1

    def cfg_of_step(self, span: Span, cfg: float, timestep: torch.Tensor) -> float:
        if not span.covers(timestep):
            return cfg
        return 1 + self.strength * ((cfg if self.guidance_scale is None else self.guidance_scale) - 1)


@dataclass
class AlternatingSampling(Itself):
    """One sampling: both predictions where ComfyUI asks for them, one of them estimated.

    `both`: evaluate both in every step; `blocks`: of the model, that ran in an evaluation.
    """

    settings: Alternating
    guider: CFGGuider
    sampler: Sampler
    span: Span
    both: bool
    asked: dict | None = None  # what ComfyUI has asked for last,
    given: list[torch.Tensor] = field(default_factory=list)  # what it was given,
    current: set[bool] = field(default_factory=set)  # and whose was evaluated there: the prompt's, the negative's
    level: float = math.inf  # sigma of the step before
    conditions: tuple | None = None  # and of whom predictions were asked for there,
    known: list[tuple[torch.Tensor, AlternatingGuidance]] = field(default_factory=list)  # for which latents (b, ...)
    evaluating: bool = False
    found: bool = False  # that both are needed, should another node have caught what tells it
    most: int = 0
    blocks: set[int] = field(default_factory=set)
    evaluated: Counter[int] = field(default_factory=Counter)  # evaluations of one prediction and of both, counted

    def __post_init__(self):
        self.override = CfgOverride(partial(self.settings.cfg_of_step, self.span))

    def install(self) -> None:
        """Into the guider's options, which are this sampling's own copy. Last in, so innermost, as for adapters."""
        options = self.guider.model_options
        wrappers = options["transformer_options"]["wrappers"]
        wrappers.setdefault(WrappersMP.CALC_COND_BATCH, {})[KEY] = [self.calc_cond_batch]
        wrappers.setdefault(WrappersMP.APPLY_MODEL, {})[KEY] = [self.apply_model]
        wrappers.setdefault(WrappersMP.PREDICT_NOISE, {})[KEY] = (
            [self.override] if self.settings.overrides and self.guider.conds.get("negative") else []
        )
        options[EVALUATES_BOTH] = self.predictions

    def predictions(self, args: dict) -> list[torch.Tensor]:
        """ComfyUI's `sampler_calc_cond_batch_function`: denoised with the prompt and with the negative."""
        self.asked, self.current = args, set()
        unwatch(args["model_options"])
        self._not_caught()
        if not self.guider.conds.get("negative"):
            self.settings.say(
                "Unguided: training-free guidance needs a negative prompt, and this workflow gives none. An empty text "
                "as the negative prompt is enough."
            )
        if args["conds"][1] is None or not self.span.covers(args["sigma"]):
            return self._evaluate(True, False)
        if not all(any(covers(cond, args["sigma"]) for cond in own) for own in args["conds"]):
            return self._evaluate(True, False)  # of which one is nothing, at this step
        if self.settings.overrides and not self.override.applied:
            self.settings.say(
                f"Guidance is {name_of_guider(self.guider)}'s own: it doesn't take another scale or strength."
            )
        if not self.both and (name := self._needs_both(args["model_options"])):
            self.both = True
            self.settings.say(f"No speed-up: {name} needs both predictions evaluated in every step.")
        if self.both:
            return self._evaluate(True, False)
        self.given = self._in_turn(args, float(args["sigma"].flatten()[0]))
        self._begin(args["model_options"])
        self.evaluated[len(self.current)] += 1
        return self.given

    def _in_turn(self, args: dict, level: float) -> list[torch.Tensor]:
        sampling, x = args["model"].model_sampling, args["input"]
        conditions = (x.shape, *(tuple(cond["uuid"] for cond in own) for own in args["conds"]))
        # Estimates are of steps with less and less noise. Asked again at a level, of other latents, both are evaluated.
        in_order = level < self.level and self.conditions in (None, conditions)
        guidance = self._nearest(x).copy() if in_order else AlternatingGuidance()
        outside = level > 1.001 * float(sampling.sigma_max)  # of the schedule, where positions say nothing
        anew = not in_order or outside
        predictions = guidance(_position(sampling, level), self._evaluate_whole, anew=anew)
        if level != self.level or self.conditions != conditions:
            self.known.clear()
        self.known.append((x.clone(), guidance))
        self.level, self.conditions = level, conditions
        return [prediction.clone() for prediction in predictions]  # for whoever changes one of them in place

    def _nearest(self, x: torch.Tensor) -> AlternatingGuidance:
        """What is known of the step before; where it was asked for several latents, of those nearest to x."""
        if len(self.known) > 1:
            return min(self.known, key=lambda latents: (latents[0] - x).norm().item())[1]
        return self.known[0][1] if self.known else AlternatingGuidance()

    def _begin(self, model_options: dict) -> None:
        """Until guidance begins both are given as equal. Another node may divide by their difference."""
        watch_use(model_options, self._used)
        combined = "sampler_cfg_function" in model_options or model_options.get(PRE_CFG)
        if combined and self.known[-1][1].delta is None:
            self._fill()

    def _used(self, given: Given) -> None:
        """Another node's function uses both predictions, or their difference, in a way that estimates may not bear."""
        self.settings.say(f"No speed-up: {name_of(given.function, self.sampler)} needs both predictions in every step.")
        self._begin_again()

    def _fill(self) -> None:
        """Evaluate what has been estimated in this step, for other nodes: estimates go on as without them."""
        for turn in {True, False} - self.current:
            self.given[not turn].copy_(self._evaluate(turn)[0])

    def _evaluate_whole(self, *turns: bool) -> list[torch.Tensor]:
        predictions = self._evaluate(*turns)
        if len(self.blocks) < self.most:
            self.settings.say(
                "No speed-up: another node, a step cache, leaves out evaluations. With one of them, both predictions "
                "are evaluated in every step; use one or the other."
            )
            self._begin_again()
        self.most = len(self.blocks)
        return predictions

    def _evaluate(self, *turns: bool) -> list[torch.Tensor]:
        asked, self.evaluating = self.asked, True
        self.blocks.clear()
        self.current.update(turns)
        # Each in its place, where other nodes look for it.
        conds = [own if turn in turns else None for turn, own in zip((True, False), asked["conds"], strict=True)]
        try:
            predictions = comfy.samplers.calc_cond_batch(
                asked["model"], conds, asked["input"], asked["sigma"], asked["model_options"]
            )
            return [predictions[0 if turn else 1] for turn in turns]
        finally:
            self.evaluating = False

    def _needs_both(self, model_options: dict) -> str | None:
        """What says that it needs both, or a sampler that takes predictions of its own way of stepping."""
        nodes = post_cfg(self.guider.model_options)
        makers = [function for function in post_cfg(model_options) if function not in nodes]
        if asks_for_both(model_options):
            return who_asks_for_both(makers or nodes, self.sampler, model_options)
        return names_of(makers, self.sampler) or None

    def calc_cond_batch(self, executor, model, conds, x, timestep, model_options):
        """CALC_COND_BATCH wrapper. Who evaluates something once more compares it with what was given to it before,
        which therefore has to be of this very step."""
        if not self.evaluating and self.asked is not None and not self.both and self.span.covers(timestep):
            own = {cond["uuid"] for cond in self.guider.conds.get("positive") or ()}
            prompt = not any(conds[1:]) and all(cond["uuid"] in own for cond in conds[0] or ())
            self._make_current(prompt, model_options)
        return executor(model, conds, x, timestep, model_options)

    def apply_model(self, executor, *args, **kwargs):
        """APPLY_MODEL wrapper, for who goes around that one, with the prompt as far as anyone can tell."""
        if not self.evaluating and self.asked is not None and not self.both and self.span.covers(self.asked["sigma"]):
            self._make_current(True, self.asked["model_options"])
        return executor(*args, **kwargs)

    def _make_current(self, prompt: bool, model_options: dict) -> None:
        if self.current == {True, False} or (prompt and True in self.current):
            return
        name = names_of(post_cfg(model_options), self.sampler) or "another node"
        if prompt and "sampler_cfg_function" not in model_options:
            self.settings.say(f"About 1.5 evaluations per step: {name} compares the prompt's with one of its own.")
            # After the combination, which keeps the estimate. Where the prompt's turn comes, it comes as before.
            self._fill()
            return
        self.settings.say(f"No speed-up: {name} compares predictions with evaluations of its own.")
        self._begin_again()

    def _begin_again(self) -> None:
        self.found = True
        raise EvaluateBoth

    def _not_caught(self) -> None:
        if self.found:
            raise EvaluateBoth

    def forget(self) -> None:
        """What was asked for leads back to here, and to the model."""
        self.asked, self.given, self.known = None, [], []

    def finish(self) -> None:
        """Say, when it is over, what it has come to."""
        self._not_caught()
        say = self.settings.say
        if self.asked is None:
            say(f"No speed-up: {name_of_guider(self.guider)} evaluates the prompts in its own way.")
        elif not self.both:
            self._report_turns()

    def _report_turns(self) -> None:
        both = self.evaluated[2] / max(1, self.evaluated.total())
        if both >= _MOST:
            self.settings.say(
                "No speed-up: most steps evaluate both predictions. They are far apart or not in order; training-free "
                "guidance wants nine steps or more."
            )
        elif any(guidance.doubted for _, guidance in self.known):
            self.settings.say(
                "About 1.5 evaluations per step: with this sampler and schedule one step tells too little of the next, "
                "so every second one evaluates both predictions."
            )
        elif both >= _MANY:
            self.settings.say(
                "About 1.5 evaluations per step: this sampler asks twice at a noise level, or its steps are far apart."
            )


@contextmanager
def _noted_blocks(model: nn.Module, ran: set[int], model_options: dict) -> Iterator[None]:
    """Inside, `ran` collects which of the model's blocks are evaluated. Not of a compiled model, where none is."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [] if is_compiled(model_options["transformer_options"]) else [block for own in lists for block in own]

    def note(block: nn.Module, inputs) -> None:
        ran.add(id(block))

    hooks = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    alternating = Alternating(guidance_scale, strength, start_percent, end_percent, once(notify))
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, alternating)
    return clone

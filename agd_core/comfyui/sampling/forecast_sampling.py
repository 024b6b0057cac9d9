"""One training-free sampling: both predictions where ComfyUI asks for them, evaluated or forecast.

Where another node needs a prediction of this very step, or leaves evaluations out, that one is evaluated every time.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, Sampler

from ..guided_step import KEY
from . import messages
from .cond_batch import CondBatch
from .conditions import is_active_at
from .evaluated_blocks import EvaluatedBlocks
from .forecast_history import ForecastHistory
from .guider import CfgOverride, OverriddenCfg, as_scale, name_of_guider
from .messages import Notify
from .post_cfg_watch import PostCfgCall, post_cfg_functions, unwatch_post_cfg, watch_post_cfg
from .restarts import PendingRestart, RestartWithoutForecasts
from .schedule import NoiseLevels, SigmaSpan
from .settings import GuidanceSettings
from .shared_by_deepcopy import SharedByDeepcopy
from .uncond_consumers import (
    EVALUATES_BOTH,
    name_uncond_requester,
    node_name,
    node_names,
    wants_uncond_at_cfg_1,
)

# The share of steps that are evaluated from which on the user is warned: 1.6 evaluations per step.
_MOST = 0.8


@dataclass
class _PairRequest:
    """ComfyUI's request for both predictions of a step: its `batch`, which of the two were `evaluated` for it, the
    prompt's (True) and the negative's (False), and the `predictions` that it was given."""

    batch: CondBatch
    evaluated: set[bool] = field(default_factory=set)
    predictions: list[torch.Tensor] = field(default_factory=list)

    def evaluate(self, *which: bool) -> list[torch.Tensor]:
        """These predictions. Each condition is in its usual place, where other nodes expect it."""
        self.evaluated.update(which)
        pairs = zip((True, False), self.batch.conds, strict=True)
        batch = replace(self.batch, conds=[own if each in which else None for each, own in pairs])
        predictions = batch.evaluate()
        return [predictions[0 if each else 1] for each in which]


@dataclass
class ForecastSampling(SharedByDeepcopy):
    """`has_steps`: whether there is anything to predict; `evaluates_both`: in every step; `request`: ComfyUI's last
    one; `evaluating`: inside an evaluation for it; `steps`: how many could be forecast, and `evaluated`: how many of
    them weren't."""

    guider: CFGGuider
    sampler: Sampler
    settings: GuidanceSettings
    span: SigmaSpan
    notify: Notify
    has_steps: bool
    evaluates_both: bool
    request: _PairRequest | None = field(default=None, init=False)
    evaluating: bool = field(default=False, init=False)
    steps: int = field(default=0, init=False)
    evaluated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.restart = PendingRestart()
        self.history = ForecastHistory()
        self.levels = NoiseLevels()
        self.blocks = EvaluatedBlocks()
        self.overridden = OverriddenCfg()

    def install(self) -> None:
        """Into the guider's options, which are this sampling's own copy. Last in, so innermost, as for adapters."""
        options = self.guider.model_options
        wrappers = options["transformer_options"]["wrappers"]
        overrides = []
        if _has_own_scale(self.settings) and self.guider.conds.get("negative"):
            cfg_of_step = partial(_cfg_of_step, self.settings, self.span, self.levels)
            overrides = [CfgOverride(cfg_of_step, self.overridden)]
        wrappers.setdefault(WrappersMP.CALC_COND_BATCH, {})[KEY] = [self.calc_cond_batch]
        wrappers.setdefault(WrappersMP.APPLY_MODEL, {})[KEY] = [self.apply_model]
        wrappers.setdefault(WrappersMP.PREDICT_NOISE, {})[KEY] = overrides
        options[EVALUATES_BOTH] = self.predict_both

    def predict_both(self, args: dict) -> list[torch.Tensor]:
        """ComfyUI's `sampler_calc_cond_batch_function`: denoised with the prompt and with the negative."""
        try:
            return self._predict_both(CondBatch.from_args(args, self.levels))
        finally:
            self.levels.forget()

    def _predict_both(self, batch: CondBatch) -> list[torch.Tensor]:
        self.request = request = _PairRequest(batch)
        unwatch_post_cfg(request.batch.model_options)
        self.restart.raise_if_requested()
        if not self.guider.conds.get("negative"):
            self.notify(messages.NO_NEGATIVE_FOR_TRAINING_FREE)
        if not self._is_guided(request.batch):
            return self._evaluate(request, True, False)
        self._check_needs(request.batch.model_options)
        scale = as_scale(self.guider.cfg)  # with ours in force, if there is one
        if self.evaluates_both or scale is None:
            return self._evaluate(request, True, False)
        request.predictions = self.history.predictions(
            request.batch,
            (scale,),
            lambda: tuple(self._evaluate_whole(request)),
            lambda both: torch.lerp(both[1], both[0], scale),
        )
        watch_post_cfg(request.batch.model_options, self._on_uncond_use)
        self.steps, self.evaluated = self.steps + 1, self.evaluated + bool(request.evaluated)
        return request.predictions

    def calc_cond_batch(self, executor, model, conds, x, timestep, model_options) -> list[torch.Tensor]:
        """CALC_COND_BATCH wrapper. A node that evaluates something once more compares it with what it was given before,
        which therefore has to be of this very step."""
        request = self._open_request()
        if request is not None and self.span.covers(timestep, self.levels):
            own = {cond["uuid"] for cond in self.guider.conds.get("positive") or ()}
            prompt = not any(conds[1:]) and all(cond["uuid"] in own for cond in conds[0] or ())
            self._make_current(request, prompt, model_options)
        return executor(model, conds, x, timestep, model_options)

    def apply_model(self, executor, *args, **kwargs) -> torch.Tensor:
        """APPLY_MODEL wrapper, for nodes that go around that one, with the prompt as far as can be known."""
        request = self._open_request()
        if request is not None and self.span.covers(request.batch.timestep, self.levels):
            self._make_current(request, True, request.batch.model_options)
        return executor(*args, **kwargs)

    def finish(self) -> None:
        """Warn, when it is over, of evaluations that it didn't save; or start it again."""
        self.restart.raise_if_requested()
        if self.request is None and self.has_steps:
            self.notify(messages.prompts_evaluated_otherwise(name_of_guider(self.guider)))
        elif not self.evaluates_both:
            self._report_evaluations()

    def release(self) -> None:
        """Drop what refers back to here, and to the model."""
        self.request, self.history = None, ForecastHistory()

    def _is_guided(self, batch: CondBatch) -> bool:
        """Whether this step is guided, and both prompts have conditions for it."""
        if batch.conds[1] is None or not self.span.covers(batch.timestep, self.levels):
            return False
        return all(any(is_active_at(cond, batch.timestep, self.levels) for cond in own or ()) for own in batch.conds)

    def _check_needs(self, model_options: dict) -> None:
        """Warn where the settings have no effect, or where a node needs both predictions."""
        if _has_own_scale(self.settings) and self.overridden.replaced is None:
            self.notify(messages.scale_not_taken(name_of_guider(self.guider)))
        if not self.evaluates_both and (name := self._find_consumer(model_options)):
            self.evaluates_both = True
            self.notify(messages.needs_both_in_every_step(name))

    def _find_consumer(self, model_options: dict) -> str | None:
        """The name of what needs both by its options, or of a sampler with a post-CFG function, by which it steps."""
        nodes = post_cfg_functions(self.guider.model_options)
        makers = [function for function in post_cfg_functions(model_options) if function not in nodes]
        if wants_uncond_at_cfg_1(model_options):
            return name_uncond_requester(makers or nodes, self.sampler, model_options)
        return node_names(makers, self.sampler) or None

    def _on_uncond_use(self, call: PostCfgCall) -> None:
        """Another node uses both predictions, or their difference, for which a forecast may not be good enough."""
        self.notify(messages.needs_both_in_every_step(node_name(call.function, self.sampler)))
        self.restart.request(RestartWithoutForecasts)

    def _evaluate_whole(self, request: _PairRequest) -> list[torch.Tensor]:
        """Both, by all of the model's blocks."""
        predictions = self._evaluate(request, True, False)
        if self.blocks.were_left_out():
            self.notify(messages.STEP_CACHE)
            self.restart.request(RestartWithoutForecasts)
        return predictions

    def _evaluate(self, request: _PairRequest, *which: bool) -> list[torch.Tensor]:
        self.evaluating = True
        self.blocks.begin()
        try:
            return request.evaluate(*which)
        finally:
            self.evaluating = False

    def _open_request(self) -> _PairRequest | None:
        """The request whose predictions an evaluation by another node would be compared with, if any is forecast."""
        return None if self.evaluating or self.evaluates_both else self.request

    def _make_current(self, request: _PairRequest, prompt: bool, model_options: dict) -> None:
        """Another node evaluates something, the `prompt` or else: have what it is compared with be of this step."""
        if request.evaluated == {True, False} or (prompt and True in request.evaluated):
            return
        name = node_names(post_cfg_functions(model_options), self.sampler) or "another node"
        if prompt and "sampler_cfg_function" not in model_options:
            self.notify(messages.compares_with_prompt(name))
            # After the combination, which keeps the forecast; so do the steps to come.
            request.predictions[0].copy_(self._evaluate(request, True)[0])
            return
        self.notify(messages.compares_with_own_evaluations(name))
        self.restart.request(RestartWithoutForecasts)

    def _report_evaluations(self) -> None:
        if self.steps and self.evaluated >= _MOST * self.steps:
            self.notify(messages.few_forecasts(2 * self.evaluated / self.steps))


def _has_own_scale(settings: GuidanceSettings) -> bool:
    """Whether guidance is by another scale than the sampler's cfg."""
    return settings.guidance_scale is not None or settings.strength != 1


def _cfg_of_step(
    settings: GuidanceSettings, span: SigmaSpan, levels: NoiseLevels, cfg: float, timestep: torch.Tensor
) -> float:
    if not span.covers(timestep, levels):
        return cfg
    return 1 + settings.strength * ((cfg if settings.guidance_scale is None else settings.guidance_scale) - 1)

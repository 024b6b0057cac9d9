"""One sampling with adapters: where ComfyUI evaluates both conditions, both get the one guided prediction."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider, Sampler

from ..guided_step import KEY, GuidedStep
from . import messages
from .applied_adapter import AppliedAdapter
from .compile_fallback import CompileFallback
from .cond_batch import CondBatch
from .conditions import are_prompt_and_negative, belong_to, is_active_at, latent_size
from .evaluated_blocks import EvaluatedBlocks, recorded_blocks
from .forecast_history import ForecastHistory
from .guider import CfgOverride, OverriddenCfg, name_of_guider
from .kept_memory import KeptMemory
from .messages import Notify
from .other_evaluations import OtherEvaluations
from .post_cfg_watch import PostCfgCall, unwatch_post_cfg, watch_post_cfg
from .restarts import PendingRestart, RestartMerged, RestartSampling, RestartWithoutForecasts, SamplingMode
from .scale_check import ScaleCheck
from .schedule import NoiseLevels, SigmaSpan
from .shared_by_deepcopy import SharedByDeepcopy
from .step_builder import StepBuilder, guiding_at
from .step_warnings import StepWarnings
from .uncond_consumers import PRE_CFG, find_uncond_consumer, node_name


@dataclass
class GuidedSampling(SharedByDeepcopy):
    """Any combination of two equal predictions, by whatever scale, is that prediction, and it is one evaluation for
    any guider, a pack's own `sampling_function`, and each of the context windows.

    `adapters`: each with its part of the sampling; `has_steps`: whether there is something to guide. `step`: what is
    being evaluated, for the hooks; `sigma`: of the step in which both predictions were asked for last; `unguided`:
    evaluates as the base does, because of the mode or for the time of one evaluation; `evaluates_base`: inside an
    evaluation of the base that began here.
    """

    guider: CFGGuider
    sampler: Sampler
    adapters: list[tuple[AppliedAdapter, SigmaSpan]]
    mode: SamplingMode
    compile_fallback: CompileFallback
    notify: Notify
    has_steps: bool
    step: GuidedStep | None = field(default=None, init=False)
    sigma: torch.Tensor | None = field(default=None, init=False)
    called: bool = field(default=False, init=False)
    evaluates_base: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.unguided = self.mode.unguided_because is not None
        self.restart = PendingRestart()
        self.overridden = OverriddenCfg()
        self.scale_check = ScaleCheck(self.guider, self.overridden)
        self.other_evaluations = OtherEvaluations(self.guider, self.sampler, self.restart, self.overridden)
        self.step_builder = StepBuilder(self.guider, self.mode.merged_omega is not None, self.notify)
        self.step_warnings = StepWarnings(self.guider, self.notify)
        self.history = ForecastHistory()
        self.blocks = EvaluatedBlocks()
        self.levels = NoiseLevels()

    @property
    def guided(self) -> bool:
        """Whether there was a guided prediction."""
        return self.other_evaluations.guided

    def forecasts(self, adapters: Iterable[AppliedAdapter]) -> bool:
        """Whether steps that these adapters guide may be forecast."""
        return not self.mode.evaluates_all and any(applied.settings.forecast for applied in adapters)

    def recorded_blocks(self) -> AbstractContextManager[None]:
        """Inside, it is seen which of the model's blocks an evaluation runs, where forecasts depend on that."""
        if self.unguided or not self.forecasts(applied for applied, _ in self.adapters):
            return nullcontext()
        network = self.guider.model_patcher.model.diffusion_model
        return recorded_blocks(network, self.blocks, self.guider.model_options)

    def install(self, pre_cfg: list[Callable]) -> None:
        """Into the guider's options, which are this sampling's own copy; `pre_cfg`: other nodes' functions there."""
        options = self.guider.model_options
        inner = options["transformer_options"]
        ours = [] if self.unguided else [self]
        # Last in, so innermost: what others do to conditions, to the cfg of a step, or to both predictions is done.
        inner["wrappers"].setdefault(WrappersMP.CALC_COND_BATCH, {})[KEY] = [s.calc_cond_batch for s in ours]
        # Without a negative ComfyUI has zeros for the unconditional, with which no cfg but 1 makes sense.
        overrides = [CfgOverride(s._cfg_of_step, self.overridden) for s in ours if self.guider.conds.get("negative")]
        inner["wrappers"].setdefault(WrappersMP.PREDICT_NOISE, {})[KEY] = overrides
        kept = [KeptMemory([applied for applied, _ in self.adapters]) for _ in ours]
        inner["wrappers"].setdefault(WrappersMP.PREPARE_SAMPLING, {})[KEY] = kept
        inner[KEY] = self
        options[PRE_CFG] = [s.check_scale for s in ours] + pre_cfg
        unwatch_post_cfg(options)
        if self.mode.unguided_because is not None and self.has_steps:
            self.notify(messages.unguided_because(self.mode.unguided_because))

    def finish(self) -> None:
        """Warn, when it is over, where the adapters had no effect on it; or start it again."""
        self._check_combination()
        self.restart.raise_if_requested()
        self.step_warnings.send_waiting()
        not_asked = self.has_steps and not self.called
        unused = self.other_evaluations.base_only or self.scale_check.unknown or not_asked
        if not self.unguided and not self.guided and unused:
            self.notify(messages.adapters_not_used(name_of_guider(self.guider)))

    def calc_cond_batch(self, executor, model, conds, x, timestep, model_options) -> list[torch.Tensor]:
        """CALC_COND_BATCH wrapper: conditions, latents x (b, c, h, w), sigma (b,) -> their predictions (b, c, h, w)."""
        try:
            return self._evaluate(CondBatch(executor, model, conds, x, timestep, model_options, self.levels))
        finally:
            self.levels.forget()

    def _evaluate(self, batch: CondBatch) -> list[torch.Tensor]:
        adapters, self.called = self._adapters_at(batch.timestep), True
        if self.unguided:
            return self._evaluate_base(batch)
        self.restart.raise_if_requested()
        if not adapters:
            return self._evaluate_base(batch)
        conds = batch.conds
        if not are_prompt_and_negative(self.guider, conds) or (conds[1] is None and self._has_guided(batch.timestep)):
            return self._evaluate_for_others(batch, adapters)
        return self._evaluate_both(batch, adapters)

    def check_scale(self, args: dict) -> list[torch.Tensor]:
        """ComfyUI's `sampler_pre_cfg_function`: evaluates again if the combination's scale isn't the assumed one."""
        if self.other_evaluations.base_only:
            self.scale_check.pending = False
        if not self.scale_check.differs(args["cond_scale"]):
            return args["conds_out"]
        predictions = CondBatch.from_args(args, self.levels).evaluate()
        self.scale_check.pending = False
        return predictions

    def on_unguided_evaluation(self) -> None:
        """An evaluation that is no guided one: asked for, or begun by another node on its own."""
        if self.mode.merged_omega is not None:
            raise RestartSampling
        if not self.evaluates_base and not self.unguided:
            self.other_evaluations.request_base(self.guider.model_options)

    def _adapters_at(self, timestep: torch.Tensor) -> list[AppliedAdapter]:
        return [applied for applied, span in self.adapters if span.covers(timestep, self.levels)]

    def _cfg_of_step(self, cfg: float, timestep: torch.Tensor) -> float:
        """The cfg that ComfyUI sees in a step, so that it asks for both predictions."""
        if self.other_evaluations.base_only:
            return cfg
        scales = [applied.settings.guidance_scale for applied in self._adapters_at(timestep)]
        return next((scale for scale in reversed(scales) if scale is not None), cfg)

    def _has_guided(self, timestep: torch.Tensor) -> bool:
        """Whether this step has had its guided prediction."""
        return self.guided and self._is_current(timestep)

    def _is_current(self, timestep: torch.Tensor) -> bool:
        if timestep is self.sigma:
            return True  # without reading a value back from the device
        return self.sigma is not None and bool(timestep.flatten()[0] == self.sigma.flatten()[0])

    def _evaluate_base(self, batch: CondBatch) -> list[torch.Tensor]:
        self.evaluates_base = True
        try:
            return batch.evaluate()
        finally:
            self.evaluates_base = False

    def _evaluate_both(self, batch: CondBatch, adapters: list[AppliedAdapter]) -> list[torch.Tensor]:
        """Both predictions of a step: the guided one twice, or the base's own where it isn't guided."""
        self._begin_step(batch, adapters)
        omegas = self._omegas(adapters)
        if self.mode.merged_omega is not None and omegas != [self.mode.merged_omega]:
            raise RestartSampling
        self.scale_check.unknown = None in omegas
        if self.other_evaluations.base_only or self.scale_check.unknown or self._is_at_cfg_1(adapters):
            return self._evaluate_base(batch)
        if self.mode.merged_omega is None and omegas == [self.mode.mergeable_omega]:
            raise RestartMerged
        return self._guide_both(batch, adapters)

    def _begin_step(self, batch: CondBatch, adapters: list[AppliedAdapter]) -> None:
        if self.scale_check.pending and not self._is_current(batch.timestep):  # each window of a step comes here
            self._check_combination()
        self.sigma = batch.timestep
        self.scale_check.pending = any(applied.settings.guidance_scale is None for applied in adapters)
        if name := find_uncond_consumer(self.sampler, batch.model_options):
            self.other_evaluations.restart_unguided(messages.needs_both(name))
        self.scale_check.assume(batch.conds)

    def _guide_both(self, batch: CondBatch, adapters: list[AppliedAdapter]) -> list[torch.Tensor]:
        self.step_warnings.send_waiting()
        self.other_evaluations.guided = True
        watch_post_cfg(batch.model_options, self._on_uncond_use, self._on_post_cfg_return)
        prediction = self._evaluated_or_forecast(batch, adapters)
        return [prediction, prediction.clone()]  # a node may change one of them in place

    def _evaluated_or_forecast(self, batch: CondBatch, adapters: list[AppliedAdapter]) -> torch.Tensor:
        """The guided prediction of a step (b, c, h, w), of the prompt."""
        if not self.forecasts(adapters):
            return self._guided_prediction(batch, adapters)
        omegas = tuple(self._omegas(adapters))
        (prediction,) = self.history.predictions(
            batch, omegas, lambda: (self._evaluate_whole(batch, adapters),), lambda predictions: predictions[0]
        )
        return prediction

    def _evaluate_whole(self, batch: CondBatch, adapters: list[AppliedAdapter]) -> torch.Tensor:
        """The guided prediction (b, c, h, w) by all of the model's blocks."""
        self.blocks.begin()
        prediction = self._guided_prediction(batch, adapters)
        active = any(is_active_at(cond, batch.timestep, batch.levels) for cond in batch.conds[0] or ())
        if active and self.blocks.were_left_out():
            self.notify(messages.STEP_CACHE)
            self.restart.request(RestartWithoutForecasts)
        return prediction

    def _check_combination(self) -> None:
        """By the next step both predictions should have been combined, and the scale of it have been seen."""
        if self.scale_check.was_missed():
            self.other_evaluations.combined_otherwise()

    def _omegas(self, adapters: list[AppliedAdapter]) -> list[float | None]:
        return [applied.omega(self.scale_check.assumed) for applied in adapters]

    def _is_at_cfg_1(self, adapters: list[AppliedAdapter]) -> bool:
        """Whether all adapters follow a cfg of 1, and none acts there, so that it is the base unguided."""
        scale = self.scale_check.assumed
        follow = all(applied.settings.guidance_scale is None for applied in adapters)
        return scale is not None and follow and not any(applied.acts_at(scale) for applied in adapters)

    def _evaluate_for_others(self, batch: CondBatch, adapters: list[AppliedAdapter]) -> list[torch.Tensor]:
        """What other nodes evaluate: the prompt once more, in another way, as PAG does; or conditions of their own."""
        self.other_evaluations.count += 1
        if self.history.was_forecast and self._is_current(batch.timestep):  # it would be compared with a forecast
            self.restart.request(RestartWithoutForecasts)
        prompt_again = self._has_guided(batch.timestep) and not any(batch.conds[1:])
        if prompt_again and belong_to(self.guider, "positive", batch.conds[0]):
            prediction = self._guided_prediction(batch, adapters)
            return [prediction, *(torch.zeros_like(prediction) for _ in batch.conds[1:])]
        self.other_evaluations.request_base(batch.model_options)
        return self._evaluate_base(batch)

    def _guided_prediction(self, batch: CondBatch, adapters: list[AppliedAdapter]) -> torch.Tensor:
        """The guided prediction (b, c, h, w) for the prompt, `batch.conds[0]`."""
        guiding = guiding_at(adapters, self._omegas(adapters))
        negatives = self.step_builder.weighted_negatives(batch, guiding)
        guiding = self.step_builder.able_to_guide(guiding, negatives)
        if not guiding:
            return self._evaluate_base(batch.of_prompt())[0]
        self.step_warnings.before_step(guiding)
        self.step = step = self.step_builder.build(batch, guiding, negatives)
        try:
            prediction = self.compile_fallback.evaluate(batch.of_prompt(), step)[0]
        finally:
            self.step = None
        if not self.step_warnings.seen_first and not step.visited and (step.changes_linears or step.at_attention):
            self.other_evaluations.restart_unguided(messages.NO_PLACE_FOR_ADAPTERS)
        self.step_warnings.after_step(guiding, latent_size(batch.x, batch.conds[0]), step)
        return prediction

    def _on_uncond_use(self, call: PostCfgCall) -> None:
        """A post-CFG function uses the unconditional prediction: it gets the base's, for it may keep it, and then the
        sampling starts again unguided."""
        if self.mode.merged_omega is None:
            batch = CondBatch.from_args({**call.args, "conds": [None, call.args["uncond"]]}, self.levels)
            self.unguided = True
            try:
                unconditional = batch.evaluate()[1]
            finally:
                self.unguided = False
            call.args["uncond_denoised"].copy_(unconditional)
        self.other_evaluations.restart_unguided(messages.needs_both(node_name(call.function, self.sampler)))

    def _on_post_cfg_return(self, call: PostCfgCall) -> None:
        """A function that has used the conditional prediction compared it with one that it has evaluated, or else with
        the guided one."""
        evaluated = self.other_evaluations.take_count()
        if "cond_denoised" in call.used and not evaluated:
            self._on_uncond_use(call)

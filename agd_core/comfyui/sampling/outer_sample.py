"""What an adapter does to a MODEL: every sampling of it is run, and run again where needed, as a `GuidedSampling`."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from comfy.samplers import CFGGuider, Sampler

from ..compiled_parts import with_original_parts
from . import messages
from .applied_adapter import AppliedAdapter, check_adapters
from .compile_fallback import CompileFallback
from .conditions import copy_conditions
from .guided_sampling import GuidedSampling
from .merging import Involved, MergingHistory, merged_into
from .messages import Notify
from .one_gpu import on_one_gpu
from .restarts import (
    RandomState,
    RestartMerged,
    RestartSampling,
    RestartUnguided,
    RestartWithoutForecasts,
    SamplingMode,
)
from .schedule import SigmaSpan, has_steps
from .shared_by_deepcopy import SharedByDeepcopy
from .uncond_consumers import PRE_CFG, find_uncond_consumer

AdapterSpans = list[tuple[AppliedAdapter, SigmaSpan]]


@dataclass
class AdapterGuidance(SharedByDeepcopy):
    """OUTER_SAMPLE wrapper. Every sampling gets a `GuidedSampling` of its own, which ends with it.

    `notify` is given each warning once. What lasts from one sampling to the next: whether the model runs compiled, and
    which samplings have low-rank changes in the weights.
    """

    adapters: tuple[AppliedAdapter, ...]
    notify: Notify
    compile_fallback: CompileFallback = field(init=False)
    merging: MergingHistory = field(default_factory=MergingHistory)

    def __post_init__(self) -> None:
        self.compile_fallback = CompileFallback(self.notify)

    def __call__(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs) -> torch.Tensor:
        guider = executor.class_obj
        given = guider.model_patcher
        original = with_original_parts(given)
        guider.model_patcher = on_one_gpu(original)
        if original is not given:
            self.notify(messages.UNCOMPILED_FOR_REPLACED_PARTS)
        if guider.model_patcher is not original:
            self.notify(messages.ONE_GPU)
        try:
            return self._sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            guider.model_patcher = given

    def _sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs) -> torch.Tensor:
        guider = executor.class_obj
        check_adapters(self.adapters, guider.model_patcher)
        adapters = [(applied, applied.settings.span_for(guider.model_patcher)) for applied in self.adapters]
        conds = copy_conditions(guider.conds)
        random_state = RandomState.of(guider.model_patcher.load_device)
        pre_cfg = list(guider.model_options.get(PRE_CFG, []))
        involved = Involved.of(guider, sampler)
        mode = self._first_mode(guider, sampler, adapters, involved)
        while True:
            sampling = GuidedSampling(
                guider, sampler, adapters, mode, self.compile_fallback, self.notify, has_steps(sigmas)
            )
            sampling.install(pre_cfg)
            try:
                with self._weights_of(mode, guider), sampling.recorded_blocks():
                    sampled = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
                sampling.finish()
            except RestartMerged:
                self.merging.guided.add(involved.evaluators)
                mode = replace(mode, merged_omega=mode.mergeable_omega)
            except RestartWithoutForecasts:
                mode = replace(mode, evaluates_all=True)
            except RestartUnguided as restart:
                mode = SamplingMode(unguided_because=restart.reason)
            except RestartSampling:
                self.merging.in_vain.add(involved)
                mode = SamplingMode(evaluates_all=mode.evaluates_all)
            else:
                if sampling.guided:
                    self.merging.guided.add(involved.evaluators)
                return sampled
            guider.conds, conds = conds, copy_conditions(conds)  # ComfyUI has processed them
            random_state.restore()

    def _first_mode(
        self, guider: CFGGuider, sampler: Sampler, adapters: AdapterSpans, involved: Involved
    ) -> SamplingMode:
        if name := find_uncond_consumer(sampler, guider.model_options):
            return SamplingMode(unguided_because=messages.needs_both(name))
        if len(adapters) == 1 and adapters[0][1].is_everything:
            return self.merging.first_mode(adapters[0][0], guider, involved)
        return SamplingMode()

    def _weights_of(self, mode: SamplingMode, guider: CFGGuider) -> AbstractContextManager:
        """Inside, the base has the weights for the mode."""
        if mode.merged_omega is None:
            return nullcontext()
        return merged_into(guider, self.adapters[0], mode.merged_omega)

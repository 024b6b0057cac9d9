"""What a step of a sampling gets: the adapters that guide it, each with its omega, and the negatives."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.samplers import CFGGuider

from ..guided_step import ActiveAdapter, GuidedStep
from . import messages
from .applied_adapter import AppliedAdapter
from .cond_batch import CondBatch
from .conditions import area_of
from .messages import Notify
from .negatives import WeightedNegative
from .prompt_cache import PromptCache

AdapterAtOmega = tuple[AppliedAdapter, float]


@dataclass
class StepBuilder:
    """Builds the steps of one sampling. `merged`: low-rank changes are in the base's weights; `tensors`: numbers on the
    device."""

    guider: CFGGuider
    merged: bool
    notify: Notify
    cache: PromptCache = field(default_factory=PromptCache)
    tensors: dict[float, torch.Tensor] = field(default_factory=dict)

    def weighted_negatives(self, batch: CondBatch, adapters: list[AdapterAtOmega]) -> tuple[WeightedNegative, ...]:
        """Those of the workflow, where an adapter uses them."""
        if not any(applied.patcher.model.uses_negative for applied, _ in adapters):
            return ()
        conds = batch.conds[1] if any(batch.conds[1:]) else self.guider.conds.get("negative")
        return self.cache.weighted_negatives(conds, batch, self._without_prompts(batch, adapters))

    def able_to_guide(
        self, adapters: list[AdapterAtOmega], negatives: tuple[WeightedNegative, ...]
    ) -> list[AdapterAtOmega]:
        """The adapters that have what they need to guide."""
        return [pair for pair in adapters if negatives or self._works_without_negative(pair[0])]

    def build(
        self, batch: CondBatch, adapters: list[AdapterAtOmega], negatives: tuple[WeightedNegative, ...]
    ) -> GuidedStep:
        """For an evaluation of the prompt, `batch.conds[0]`."""
        areas = {}
        if any(negative.weight is not None for negative in negatives):
            areas = {cond["uuid"]: area_of(cond, batch.x, batch.timestep) for cond in batch.conds[0] or ()}
        alone = self._without_prompts(batch, adapters)
        active = [replace(each, negatives=self._negatives_of(each, batch, negatives, alone)) for each in alone.active]
        step = GuidedStep(tuple(active), areas, prompts=self.cache.positives(batch, alone))
        self.cache.end_step()
        return step

    def _works_without_negative(self, applied: AppliedAdapter) -> bool:
        if applied.info.negative_mode == "used" and not applied.info.unconditional:
            self.notify(messages.NO_NEGATIVE_FOR_UNTRAINED)
            return False
        return True

    def _without_prompts(self, batch: CondBatch, adapters: list[AdapterAtOmega]) -> GuidedStep:
        """The step as far as it does not depend on prompts."""
        device, active = batch.x.device, []
        for applied, omega in adapters:
            strength = self._tensor(applied.settings.strength, device)
            active.append(
                ActiveAdapter(applied.patcher.model, self._tensor(omega, device), strength, merged=self.merged)
            )
        return GuidedStep(tuple(active))

    def _negatives_of(
        self, active: ActiveAdapter, batch: CondBatch, negatives: tuple[WeightedNegative, ...], step: GuidedStep
    ) -> tuple[WeightedNegative, ...]:
        adapter: Any = active.adapter
        if not adapter.uses_negative:
            return ()
        return negatives or self.cache.trained_unconditional(adapter.unconditional, batch, step)

    def _tensor(self, value: float, device: torch.device) -> torch.Tensor:
        """(1,) fp32. Made by the device itself: sending it there would wait for all that is queued before."""
        if value not in self.tensors:
            self.tensors[value] = torch.full((1,), value, device=device, dtype=torch.float32)
        return self.tensors[value]


def guiding_at(adapters: list[AppliedAdapter], omegas: list[float | None]) -> list[AdapterAtOmega]:
    """The adapters that do anything at their omega."""
    pairs = zip(adapters, omegas, strict=True)
    return [(applied, omega) for applied, omega in pairs if omega is not None and applied.acts_at(omega)]

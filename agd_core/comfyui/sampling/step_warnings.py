"""What may surprise the user of guided steps; the sentences are in `messages.py`."""

from dataclasses import dataclass

import torch
from comfy.samplers import CFGGuider

from ..guided_step import GuidedStep
from . import messages
from .conditions import mean_token, with_text
from .messages import Notify
from .step_builder import AdapterAtOmega

# Latents of up to twice the pixels of a trained size, or down to half of them, are not warned of.
_MAX_SIZE_RATIO = 2.0
# A negative prompt this much nearer to the trained unconditional than the positive one is taken for it.
_SAME_DISTANCE = 0.25
# Adapters whose strengths sum up to more than this are hardly meant to work in the same step.
_MAX_TOTAL_STRENGTH = 1.25


@dataclass(frozen=True)
class _FirstStep:
    adapters: list[AdapterAtOmega]
    size: torch.Size  # of the latents, (h, w)
    step: GuidedStep


@dataclass
class StepWarnings:
    """The warnings of one sampling. Those of its first step wait until it is sure that it stays guided.

    `seen_first`: whether there was a first step; `waiting`: that step, until its warnings are sent.
    """

    guider: CFGGuider
    notify: Notify
    seen_first: bool = False
    waiting: _FirstStep | None = None

    def before_step(self, adapters: list[AdapterAtOmega]) -> None:
        """Those of any step but the first."""
        if self.seen_first:
            self._check_omegas(adapters)

    def after_step(self, adapters: list[AdapterAtOmega], size: torch.Size, step: GuidedStep) -> None:
        """Keep the first one, for later a step cache may leave out what there is to see; `size`: of latents, (h, w)."""
        if not self.seen_first:
            self.seen_first, self.waiting = True, _FirstStep(adapters, size, step)
        else:
            self._check_places(step)

    def send_waiting(self) -> None:
        first, self.waiting = self.waiting, None
        if first is None:
            return
        for pair in first.adapters:
            self._check_omegas([pair])
            self._check_size(pair, first.size)
            self._check_negative(pair)
        self._check_strengths(first.adapters)
        self._check_layers(first.step)
        self._check_places(first.step)

    def _check_omegas(self, adapters: list[AdapterAtOmega]) -> None:
        for applied, omega in adapters:
            low, high = applied.info.omega_range
            if not low <= omega <= high:
                self.notify(messages.omega_outside_range(omega, low, high))

    def _check_size(self, pair: AdapterAtOmega, size: torch.Size) -> None:
        height, width = size
        trained = pair[0].info.resolutions
        ratios = [height * width / (h * w) for h, w in trained]
        if ratios and not any(1 / _MAX_SIZE_RATIO <= ratio <= _MAX_SIZE_RATIO for ratio in ratios):
            self.notify(messages.latent_size_far_from_trained(height, width, trained))

    def _check_negative(self, pair: AdapterAtOmega) -> None:
        applied, _ = pair
        if applied.info.negative_mode == "ignored" and _has_other_negative(self.guider, applied.unconditional):
            self.notify(messages.negative_has_no_effect(applied.info.unconditional))

    def _check_strengths(self, adapters: list[AdapterAtOmega]) -> None:
        if len(adapters) > 1 and sum(applied.settings.strength for applied, _ in adapters) > _MAX_TOTAL_STRENGTH:
            self.notify(messages.strengths_add_up(len(adapters)))

    def _check_layers(self, step: GuidedStep) -> None:
        missing = set(step.layer_names()) - set(step.visited)
        if missing and step.at_attention:
            self.notify(messages.layers_skipped(len(missing), len(step.layer_names())))

    def _check_places(self, step: GuidedStep) -> None:
        if any(negative.unplaced for active in step.active for negative in active.negatives):
            self.notify(messages.NEGATIVES_UNPLACED)


def _has_other_negative(guider: CFGGuider, trained: torch.Tensor) -> bool:
    """Whether the negative is another than the unconditional of the training, whose mean token (d,) is `trained`."""
    positive, negative = (
        [mean_token(cond) for cond in with_text(guider.conds.get(kind))] for kind in ("positive", "negative")
    )
    if not positive or not negative:
        return False
    usual = min(float((mean - trained).norm()) for mean in positive)
    return max(float((mean - trained).norm()) for mean in negative) > _SAME_DISTANCE * usual

"""The adapter on prompts that are not trained with: how much of the gap it closes, and a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..agd_core.adapter import Adapter
from .config import TrainConfig
from .euler_sample import SampleSettings, sample
from .gap import (
    Evaluation,
    Trajectories,
    TrajectoryState,
    evaluate,
    follow_teacher,
    omegas_of,
)
from .memory import BothPredictions
from .model import Denoiser, Model, ProgressCallback, Prompt, part_of
from .plot import preview

# The held-out trajectories' steps, and how many of these are measured at (None: all that are learnt): the first of
# these by which anything can be measured.
_STEPS = ((20, 8), (20, None), (40, None), (80, None))


@dataclass(frozen=True)
class HeldOutPrompts:
    """Encoded. `measured`: to measure on, perhaps none; `negative`: those of the training; `shown`: the preview's, and
    `unconditional`: its negative prompt.
    """

    measured: list[Prompt]
    negative: list[Prompt]
    shown: Prompt
    unconditional: Prompt

    def negative_of_measured(self) -> list[Prompt]:
        return _spread(self.negative, len(self.measured))


def _spread(negative: Sequence[Any], count: int) -> list[Any]:
    """So many of the negatives of the training, evenly spread over them."""
    return [negative[i * len(negative) // count] for i in range(count)]


def check_measurable(denoiser: Denoiser, config: TrainConfig, held_out: Sequence[str], negative: Sequence[str]) -> None:
    """Raises `ValueError` where a measurement on these prompts would have nothing to measure."""
    if not held_out:
        return
    if list(held_out) == _spread(negative, len(held_out)):
        raise ValueError(
            "Guidance would change nothing of what is measured: the prompts that are kept out of training equal their "
            "negative prompts. Choose other negative prompts."
        )
    _to_measure(denoiser, config)


def _to_measure(denoiser: Denoiser, config: TrainConfig) -> Trajectories:
    """The held-out trajectories of such a training. Raises `ValueError`."""
    shape, where = denoiser.latent_shape(*config.buckets()[0]), config.learns_at
    for steps, keep in _STEPS:
        keep = keep if config.learns_everywhere else None
        found = Trajectories(shape, omegas_of(config), rule=config.rule, steps=steps, keep=keep, where=where)
        if found.can_measure(denoiser):
            return found
    raise ValueError(
        f"The training couldn't be measured: no step of a sampling run, of {_STEPS[-1][0]} steps even, is at a noise "
        "level that is both learnt and guided. Choose a wider range of noise levels (sigma_from, sigma_to) or a wider "
        "interval of guidance (interval_sigma_min, interval_sigma_max)."
    )


class HeldOutEvaluation:
    """Fixed prompts, seeds and noise levels. What the teacher does there is computed once, when it is first needed."""

    def __init__(self, model: Model, config: TrainConfig, prompts: HeldOutPrompts, both: BothPredictions):
        """`both`: as many of its rows are evaluated at once."""
        self.model, self.config, self.prompts, self.both = model, config, prompts, both
        self.shape = model.denoiser.latent_shape(*config.buckets()[0])
        self._states: list[TrajectoryState] = []
        self._guided: Image.Image | None = None

    def measure(self, adapter: Adapter, of_phase: Callable[[str], ProgressCallback]) -> Evaluation:
        """Gap closed per omega and sigma."""
        if not self._states:
            self._states = self._follow_teacher(of_phase("teacher"))
        return evaluate(self.model.denoiser, adapter, self._states, of_phase("measure"))

    def _follow_teacher(self, progress: ProgressCallback) -> list[TrajectoryState]:
        rows, negative = max(1, self.both.rows // 2), self.prompts.negative_of_measured()
        trajectories = _to_measure(self.model.denoiser, self.config)
        return follow_teacher(self.model.denoiser, self.prompts.measured, negative, trajectories, rows, progress)

    @torch.no_grad()
    def show(self, adapter: Adapter, step: int, of_phase: Callable[[str], ProgressCallback]) -> Image.Image:
        """A picture of one prompt by the teacher beside the same by the adapter, of that step."""
        config = self.config
        omega = omegas_of(config)[-2] if len(omegas_of(config)) > 1 else config.omega_max
        settings = SampleSettings(self.shape, omega, rule=config.rule)
        what = self.model.denoiser, self.prompts.shown, self.prompts.unconditional, settings
        progress, by_teacher = of_phase("preview"), 0 if self._guided is not None else 2 * settings.steps
        total = by_teacher + settings.steps
        if self._guided is None:  # decoded once: a VAE may take the base's place on the device
            self._guided = self.model.picture(sample(*what, None, part_of(progress, 0, total)))
        own = self.model.picture(sample(*what, adapter, part_of(progress, by_teacher, total)))
        teacher = config.teacher.replace("_", " ").upper()
        return preview({f"{teacher} {omega:g}": self._guided, f"AGD {omega:g}, step {step}": own})

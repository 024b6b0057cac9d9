"""The adapter on prompts that are not trained with: how much of the gap it closes, and a picture."""

from collections.abc import Callable
from dataclasses import dataclass

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
from .model import Model, ProgressCallback, Prompt, part_of
from .plot import preview

_KEPT_STEPS = 8  # of the held-out trajectories' twenty: to measure at


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
        """One each, evenly spread over the negatives of the training."""
        count = len(self.measured)
        return [self.negative[i * len(self.negative) // count] for i in range(count)]


class HeldOutEvaluation:
    """Fixed prompts, seeds and noise levels. What the teacher does there is computed once, when it is first needed."""

    def __init__(self, model: Model, config: TrainConfig, prompts: HeldOutPrompts, both: BothPredictions):
        """`both`: as many of its rows are evaluated at once."""
        self.model, self.config, self.prompts, self.both = model, config, prompts, both
        self.shape = model.denoiser.latent_shape(*config.buckets()[0])
        self._states: list[TrajectoryState] = []
        self._guided: torch.Tensor | None = None

    def measure(self, adapter: Adapter, of_phase: Callable[[str], ProgressCallback]) -> Evaluation:
        """Gap closed per omega and sigma."""
        if not self._states:
            self._states = self._follow_teacher(of_phase("teacher"))
        return evaluate(self.model.denoiser, adapter, self._states, of_phase("measure"))

    def _follow_teacher(self, progress: ProgressCallback) -> list[TrajectoryState]:
        prompts, config = self.prompts, self.config
        keep = _KEPT_STEPS if config.learns_everywhere else None
        trajectories = Trajectories(self.shape, omegas_of(config), rule=config.rule, keep=keep)
        rows, negative = max(1, self.both.rows // 2), prompts.negative_of_measured()
        states = follow_teacher(self.model.denoiser, prompts.measured, negative, trajectories, rows, progress)
        return [state for state in states if config.learns_at(torch.tensor(state.sigma))]

    @torch.no_grad()
    def show(self, adapter: Adapter, step: int, of_phase: Callable[[str], ProgressCallback]) -> Image.Image:
        """A picture of one prompt by the teacher beside the same by the adapter, of that step."""
        config = self.config
        omega = omegas_of(config)[-2] if len(omegas_of(config)) > 1 else config.omega_max
        settings = SampleSettings(self.shape, omega, rule=config.rule)
        what = self.model.denoiser, self.prompts.shown, self.prompts.unconditional, settings
        progress, by_teacher = of_phase("preview"), 0 if self._guided is not None else 2 * settings.steps
        total = by_teacher + settings.steps
        if self._guided is None:
            self._guided = sample(*what, None, part_of(progress, 0, total))
        own = sample(*what, adapter, part_of(progress, by_teacher, total))
        teacher = config.teacher.replace("_", " ").upper()
        latents = {f"{teacher} {omega:g}": self._guided, f"AGD {omega:g}, step {step}": own}
        return preview({name: self.model.picture(latent) for name, latent in latents.items()})

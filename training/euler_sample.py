"""Whole samples by Euler's method: by the teacher, or with an adapter."""

from dataclasses import dataclass

import torch

from ..agd_core.adapter import Adapter
from ..agd_core.guidance import GuidanceRule
from ..agd_core.seeds import seeded_generator
from .finite import base_prediction
from .gap import CFG
from .model import Denoiser, ProgressCallback, Prompt, Shape, no_progress
from .solvers import solver_step


@dataclass(frozen=True)
class SampleSettings:
    """Of one sample by Euler's method."""

    shape: Shape
    omega: float
    rule: GuidanceRule = CFG
    steps: int = 20
    seed: int = 1


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    prompt: Prompt,
    negative: Prompt,
    settings: SampleSettings,
    adapter: Adapter | None = None,
    progress: ProgressCallback = no_progress,
) -> torch.Tensor:
    """A latent (1, c, h, w): with the adapter in one evaluation per step, or by the teacher in two.

    `progress` counts evaluations. Raises `BaseNotFinite`.
    """
    sigmas, omega = denoiser.sigmas("normal", settings.steps), torch.tensor([float(settings.omega)])
    noise = torch.randn(1, *settings.shape, generator=seeded_generator(settings.seed))
    x, evaluations = denoiser.start(noise, sigmas[:1]), 2 if adapter is None else 1
    progress(0, settings.steps * evaluations)
    for i in range(settings.steps):
        sigma = sigmas[i : i + 1]
        if adapter is not None:
            denoised = denoiser.student(adapter, x, sigma, [prompt], [negative], omega).cpu()
        else:
            cond, uncond = (base_prediction(denoiser, x, sigma, [each]) for each in (prompt, negative))
            denoised = settings.rule(x, sigma, cond, uncond, omega)
        x = solver_step(x, denoised, sigma, sigmas[i + 1 : i + 2])
        progress((i + 1) * evaluations, settings.steps * evaluations)
    return x

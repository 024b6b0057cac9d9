"""Caches of whole steps, as others have them: on CFG, and on an adapter. None knows what guides the model."""

from dataclasses import dataclass, field

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

from comfyui_agd.benchmarks.sparse_guidance import Step

_KEY = "agd_spectrum"
_KEPT = 10  # evaluations that Spectrum fits its polynomial to, as published


def easy_cache(model: comfy.model_patcher.ModelPatcher, threshold: float) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's own node, whose defaults the rest has."""
    return EasyCacheNode.execute(model, threshold, 0.15, 0.95, False).result[0]


def lazy_cache(model: comfy.model_patcher.ModelPatcher, threshold: float) -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's own node, whose defaults the rest has."""
    return LazyCacheNode.execute(model, threshold, 0.15, 0.95, False).result[0]


@dataclass(frozen=True)
class SpectrumSettings:
    """Of Han et al. 2026 (arXiv 2603.01623), by default as its users have it for SDXL.

    Forecasts are `weight` times the polynomial's of this `degree`, fitted with `ridge`, and else a straight line
    through the last two evaluations. `warm_up` steps are evaluated at first and `last` in the end; between them one in
    `window` is, which grows by `flex` with each.
    """

    weight: float = 0.3
    degree: int = 3
    ridge: float = 0.1
    window: float = 2.0
    flex: float = 0.25
    warm_up: int = 8
    last: int = 3


AS_PUBLISHED = SpectrumSettings(weight=1.0, degree=4, warm_up=5, last=0)


@dataclass
class Spectrum:
    """PREDICT_NOISE wrapper: a step's prediction, guidance and all, is evaluated, or forecast from those before.

    What is forecast is the derivative (`sparse_guidance`), the model's own output. As the forecast is linear in the
    evaluations, those of both branches need not be told apart. `evaluated`: (step's index, derivative) of the last ones
    of this sampling; `window`: as it is by now; `forecast`: how many steps were in a row.
    """

    settings: SpectrumSettings
    evaluated: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    window: float = 0.0
    forecast: int = 0

    def __call__(self, executor, x, timestep, model_options={}, seed=None):
        step = Step.of(x, timestep, model_options)
        if step.index == 0:
            self.evaluated, self.window, self.forecast = [], self.settings.window, 0
        if not self._is_evaluated(step):
            self.forecast += 1
            return step.denoised(forecast(self.settings, self.evaluated, step.index, step.count))
        denoised = executor(x, timestep, model_options, seed)
        self.evaluated = [*self.evaluated, (step.index, step.derivative(denoised))][-_KEPT:]
        self.forecast = 0
        return denoised

    def _is_evaluated(self, step: Step) -> bool:
        if step.index < self.settings.warm_up or step.index >= step.count - self.settings.last:
            return True
        if (self.forecast + 1) % int(self.window):
            return False
        self.window += self.settings.flex
        return True


def forecast(settings: SpectrumSettings, evaluated: list[tuple[int, torch.Tensor]], index: int, count: int):
    """The derivative at the index-th of `count` steps, (b, c, h, w)."""
    indices, values = zip(*evaluated, strict=True)
    stacked = torch.stack(values).flatten(1)  # (k, b c h w)
    basis = chebyshev(torch.tensor([*indices, index]) / count * 2 - 1, settings.degree).to(stacked)
    known, now = basis[:-1], basis[-1]
    gram = known.T @ known + settings.ridge * torch.eye(settings.degree + 1).to(stacked)
    polynomial = (torch.linalg.solve(gram, now) @ known.T @ stacked).reshape_as(values[-1])
    if len(values) == 1:
        return torch.lerp(values[-1], polynomial, settings.weight)
    slope = (values[-1] - values[-2]) / (indices[-1] - indices[-2])
    return torch.lerp(values[-1] + (index - indices[-1]) * slope, polynomial, settings.weight)


def chebyshev(tau: torch.Tensor, degree: int) -> torch.Tensor:
    """T_0 to T_degree at tau (k,) in [-1, 1]: (k, degree + 1)."""
    return torch.cos(torch.acos(tau.clamp(-1, 1))[:, None] * torch.arange(degree + 1))


def spectrum(
    model: comfy.model_patcher.ModelPatcher, settings: SpectrumSettings = SpectrumSettings()
) -> comfy.model_patcher.ModelPatcher:
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _KEY, Spectrum(settings))
    return clone

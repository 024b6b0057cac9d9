"""CFG with fewer evaluations of the negative prompt, as others do it: at which steps, and what stands in elsewhere.

A way is two functions: `When` says for which pictures of a step the negative prompt is evaluated, an `Estimate` gives
its prediction for the others. `sparse` puts both in the place of ComfyUI's evaluation. Estimates are made of
derivatives, (x - denoised) / sigma, which are eps, or v in a flow model: from step to step those change least.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_patcher
import comfy.samplers
import torch

from comfyui_agd.agd_core.guidance import GuidanceRule

# Castillo et al. have 0.991 for a latent model of 512x512 pixels. Here both branches agree by 0.998 from the first
# step on, so that threshold would switch guidance off at once; at 0.999 it lasts for about half of the steps.
AGREEMENT = 0.999
# Of FasterCache: from which share of the schedule on differences are reused, how often they are evaluated there, by
# what they grow with every step, and in which part of the schedule the low and the high frequencies do.
REUSED_FROM, REUSED_EVERY, GROWTH = 1 / 3, 5, 1.1
LOW_GROWS, HIGH_GROWS = (0.1, 0.9), (0.7, 1.0)
LOW_RADIUS = 1 / 5  # of the shorter side's frequencies: what counts as low


@dataclass(frozen=True)
class Step:
    """A step, the `index`-th of `count`, at noisy latents `x` (b, c, h, w) and noise levels `sigma` (b,)."""

    index: int
    count: int
    x: torch.Tensor
    sigma: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, sigma: torch.Tensor, model_options: dict) -> "Step":
        """From what ComfyUI tells an evaluation."""
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        index = (sigmas[:-1] - sigma.flatten()[0].to(sigmas)).abs().argmin().item()
        return cls(index, len(sigmas) - 1, x, sigma)

    @property
    def position(self) -> float:
        """The share of the steps that is over: 0 at the first."""
        return self.index / self.count

    def derivative(self, denoised: torch.Tensor) -> torch.Tensor:
        return (self.x - denoised) / self._sigma

    def denoised(self, derivative: torch.Tensor) -> torch.Tensor:
        return self.x - self._sigma * derivative

    @property
    def _sigma(self) -> torch.Tensor:
        return self.sigma.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Predictions:
    """Both derivatives at a step, (b, c, h, w). `evaluated`: for which pictures (b,) the negative's is no estimate."""

    step: Step
    cond: torch.Tensor
    uncond: torch.Tensor
    evaluated: torch.Tensor


History = Sequence[Predictions]  # of one sampling, from its first step on
When = Callable[[Step, History], "bool | torch.Tensor"]
# From the prompt's derivative at a step, the negative's.
Estimate = Callable[[Step, torch.Tensor, History], torch.Tensor]


def last_evaluated(history: History) -> Predictions:
    """The latest step at which both were evaluated for all pictures."""
    return next(predictions for predictions in reversed(history) if predictions.evaluated.all())


# When the negative prompt is evaluated.


def always(step: Step, history: History) -> bool:
    return True


def every(k: int, until: float = 1.0) -> When:
    """At every k-th step from the first on, in the first part of the schedule."""
    return lambda step, history: step.index % k == 0 and step.position < until


def first(share: float) -> When:
    """In the first steps only (Zhang et al. 2025, arXiv 2506.08351: Step AG)."""
    return lambda step, history: step.index < round(share * step.count)


def inside(rule: GuidanceRule) -> When:
    """Where rule.sigma_min < sigma <= rule.sigma_max (Kynkäänniemi et al. 2024)."""
    return lambda step, history: rule.sigma_min < step.sigma.flatten()[0].item() <= rule.sigma_max


def until_agreement(agreement: float) -> When:
    """Castillo et al. 2023 (arXiv 2312.12487), Adaptive Guidance: once both predictions of noise agree, a picture goes
    on without the second. Each picture decides for itself."""

    def when(step: Step, history: History) -> bool | torch.Tensor:
        if not history:
            return True
        last = history[-1]
        cosine = torch.cosine_similarity(last.cond.flatten(1), last.uncond.flatten(1))
        return last.evaluated & (cosine <= agreement)

    return when


def faster_cache(step: Step, history: History) -> bool:
    """Lv et al. 2024 (arXiv 2410.19355), CFG-Cache: at every step at first, then at every fifth."""
    return step.position < REUSED_FROM or step.index % REUSED_EVERY == 0


def thinned(share: float) -> When:
    """At this share of the steps, further and further apart: the coarse schedule on which guidance is integrated by Lee
    et al. 2025 (arXiv 2511.04117). Theirs comes from a bound of the error, this one from a power of the index."""

    def when(step: Step, history: History) -> bool:
        evaluated = max(1, round(share * step.count))
        return step.index in {max(i, int(step.count * (i / evaluated) ** 1.5)) for i in range(evaluated)}

    return when


# What the negative's derivative is taken for.


def no_guidance(step: Step, cond: torch.Tensor, history: History) -> torch.Tensor:
    return cond


def same_difference(step: Step, cond: torch.Tensor, history: History) -> torch.Tensor:
    """As far from the prompt's as when both were evaluated last."""
    last = last_evaluated(history)
    return cond + (last.uncond - last.cond)


def growing_difference(step: Step, cond: torch.Tensor, history: History) -> torch.Tensor:
    """CFG-Cache's: the same, and with every step its low frequencies grow, late in the schedule its high ones."""
    last = last_evaluated(history)
    positions = [(last.step.index + 1 + i) / step.count for i in range(step.index - last.step.index)]
    low, high = (GROWTH ** sum(a < p < b for p in positions) for a, b in (LOW_GROWS, HIGH_GROWS))
    difference = torch.fft.fft2(last.uncond - last.cond)
    is_low = low_frequencies(*cond.shape[-2:]).to(cond.device)
    return cond + torch.fft.ifft2(torch.where(is_low, low * difference, high * difference)).real


def low_frequencies(height: int, width: int) -> torch.Tensor:
    """Which of fft2's frequencies are low: bool (h, w)."""
    rows, columns = (torch.fft.fftfreq(size) * size for size in (height, width))
    return rows[:, None].square() + columns.square() <= max(1, int(LOW_RADIUS * min(height, width))) ** 2


@dataclass(frozen=True)
class LinearEstimate:
    """Castillo et al. 2023, LinearAG: a weighted sum of all predictions before, and of the prompt's now. The weights of
    each step (`weights`, index -> 2 index + 1) are fitted to samplings with CFG; after `until` there is no guidance.
    """

    weights: Sequence[torch.Tensor]
    until: float = 1.0

    def __call__(self, step: Step, cond: torch.Tensor, history: History) -> torch.Tensor:
        if step.position >= self.until:
            return cond
        return torch.einsum("k,kbchw->bchw", self.weights[step.index].to(cond), regressors(cond, history))


def regressors(cond: torch.Tensor, history: History) -> torch.Tensor:
    """The prompt's derivatives up to now and the negative's before: (2 index + 1, b, c, h, w)."""
    return torch.stack([each.cond for each in history] + [cond] + [each.uncond for each in history])


def fit_weights(history: History) -> list[torch.Tensor]:
    """Of `LinearEstimate`, by ordinary least squares, from a sampling that evaluated everything."""
    weights = []
    for index, now in enumerate(history):
        terms = regressors(now.cond, history[:index]).double().flatten(1)  # (2 index + 1, values)
        found = torch.linalg.lstsq(terms.T, now.uncond.double().reshape(-1, 1), driver="gelsd")
        weights.append(found.solution[:, 0].float())
    return weights


# In ComfyUI.


@dataclass
class SparseGuidance:
    """ComfyUI's `sampler_calc_cond_batch_function`. Where all pictures need both predictions, both are evaluated as
    ComfyUI does. `history`: of the sampling that goes on."""

    when: When
    estimate: Estimate
    history: tuple[Predictions, ...] = ()

    def __call__(self, args: dict) -> list[torch.Tensor]:
        """[denoised with the prompt, with the negative], (b, c, h, w) each."""
        positive, negative = args["conds"]
        step = Step.of(args["input"], args["sigma"], args["model_options"])
        self.history = self.history if step.index else ()
        if negative is None:  # at cfg 1
            return _evaluate(args, args["conds"])
        evaluated = torch.as_tensor(self.when(step, self.history)).expand(len(step.x))
        if evaluated.all():
            cond, uncond = _evaluate(args, [positive, negative])
        else:
            (cond,) = _evaluate(args, [positive])
            uncond = self._completed(args, step, cond, evaluated.nonzero()[:, 0])
        now = Predictions(step, step.derivative(cond), step.derivative(uncond), evaluated)
        self.history = (*self.history, now)
        return [cond, uncond]

    def _completed(self, args: dict, step: Step, cond: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The negative's prediction, evaluated for these rows and estimated for the others."""
        estimated = self.estimate(step, step.derivative(cond), self.history)
        uncond = step.denoised(estimated)
        if len(rows):
            own = args | {"input": step.x[rows], "sigma": step.sigma[rows]}
            (uncond[rows],) = _evaluate(own, [_of_rows(args["conds"][1], rows, len(step.x))])
        return uncond


def _evaluate(args: dict, conds: list) -> list[torch.Tensor]:
    return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])


def _of_rows(conds: list[dict], rows: torch.Tensor, count: int) -> list[dict]:
    """Conditions for these rows of a batch of `count`, of which each row may have a prompt of its own."""

    def chosen(cond):
        return cond._copy_with(cond.cond[rows.to(cond.cond.device)]) if len(cond.cond) == count else cond

    return [{**cond, "model_conds": {key: chosen(c) for key, c in cond["model_conds"].items()}} for cond in conds]


def sparse(
    model: comfy.model_patcher.ModelPatcher, when: When, estimate: Estimate = no_guidance
) -> comfy.model_patcher.ModelPatcher:
    """A clone that samples with CFG in this way."""
    clone = model.clone()
    clone.set_model_sampler_calc_cond_batch_function(SparseGuidance(when, estimate))
    return clone


def limited_interval(model: comfy.model_patcher.ModelPatcher, rule: GuidanceRule) -> comfy.model_patcher.ModelPatcher:
    """CFG inside of the rule's interval, one pass elsewhere."""
    return sparse(model, inside(rule))


def adaptive(model: comfy.model_patcher.ModelPatcher, agreement: float = AGREEMENT) -> comfy.model_patcher.ModelPatcher:
    """Adaptive Guidance."""
    return sparse(model, until_agreement(agreement))

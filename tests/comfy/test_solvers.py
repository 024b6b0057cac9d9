"""The samplers of training trajectories against ComfyUI's own, over whole trajectories of a known denoiser."""

from types import SimpleNamespace

import comfy.k_diffusion.sampling as comfyui
import comfy.model_sampling
import comfy.samplers
import pytest
import torch

from comfyui_agd.agd_core.guidance import per_row
from comfyui_agd.training.solvers import SOLVERS, Ancestral, SecondOrder, solver_step

X, MEAN, *NOISES = torch.randn(22, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SAMPLING = comfy.model_sampling.ModelSamplingDiscrete()


class Gaussian:
    """The denoiser of data around MEAN, with what ComfyUI's samplers ask of a model."""

    inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=SAMPLING))

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_) -> torch.Tensor:
        pull = sigma**2 / (sigma**2 + 0.5**2)
        return x + per_row(pull, x) * (MEAN - x)


def ours(x: torch.Tensor, sigmas: torch.Tensor, solvers: list[str], flow: bool = False) -> torch.Tensor:
    """`x` at the end; a row each with its solver."""
    before, rows = x, len(x)
    ancestral = torch.tensor([solver == "euler_ancestral" for solver in solvers])
    second = torch.tensor([solver == "dpmpp_2m" for solver in solvers])
    for i in range(len(sigmas) - 1):
        sigma_before, sigma, sigma_next = (sigmas[j].expand(rows) for j in (max(0, i - 1), i, i + 1))
        denoised = Gaussian()(x, sigma)
        extrapolated = SecondOrder(second & (i > 0), before, sigma_before)
        x = solver_step(x, denoised, sigma, sigma_next, Ancestral(ancestral, NOISES[i][:rows], flow), extrapolated)
        before = denoised
    return x


@pytest.mark.parametrize("scheduler", ["normal", "karras", "exponential", "sgm_uniform", "simple"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_trajectories_are_those_of_comfyuis_samplers(scheduler, steps):
    sigmas = comfy.samplers.calculate_sigmas(SAMPLING, scheduler, steps).double()
    x, noises = X * sigmas[0], iter(NOISES)
    theirs = {
        "euler": comfyui.sample_euler(Gaussian(), x, sigmas, disable=True),
        "euler_ancestral": comfyui.sample_euler_ancestral(
            Gaussian(), x, sigmas, disable=True, noise_sampler=lambda *_: next(noises)
        ),
        "dpmpp_2m": comfyui.sample_dpmpp_2m(Gaussian(), x, sigmas, disable=True),
    }
    assert set(theirs) == set(SOLVERS)
    for solver, expected in theirs.items():
        found = ours(x, sigmas, [solver] * len(x))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["normal", "simple", "beta"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_trajectories_of_flow_matching_are_too(scheduler, steps):
    """Every solver steps along the same slope as without flow, but for the noise that is added."""
    sampling = type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST), {})()
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).double()
    patcher = SimpleNamespace(get_model_object=lambda name: sampling)
    model = Gaussian()
    model.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling), model_patcher=patcher)
    noises = iter(NOISES)
    expected = comfyui.sample_euler_ancestral(model, X, sigmas, disable=True, noise_sampler=lambda *_: next(noises))
    torch.testing.assert_close(ours(X, sigmas, ["euler_ancestral"] * len(X), flow=True), expected, rtol=1e-5, atol=1e-6)
    for solver, theirs in (("euler", comfyui.sample_euler), ("dpmpp_2m", comfyui.sample_dpmpp_2m)):
        found = ours(X, sigmas, [solver] * len(X), flow=True)
        torch.testing.assert_close(found, theirs(model, X, sigmas, disable=True), rtol=1e-5, atol=1e-6)

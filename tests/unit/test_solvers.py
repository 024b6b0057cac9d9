"""One step of every sampler that trajectories follow; tests/comfy/test_solvers.py holds them against ComfyUI's own."""

import torch

from comfyui_agd.agd_core.guidance import per_row
from comfyui_agd.training.solvers import SOLVERS, Ancestral, SecondOrder, solver_step

ROWS = 3
GENERATOR = torch.Generator().manual_seed(0)
X, DENOISED, NOISE, BEFORE = torch.randn(4, ROWS, 2, 3, 3, generator=GENERATOR)
SIGMA_BEFORE, SIGMA, SIGMA_NEXT = torch.tensor([[9.0, 7.0, 3.0], [4.0, 2.0, 1.0], [2.0, 0.5, 0.0]])


def step(solvers: list[str], rows: slice = slice(None), sigma_next: torch.Tensor = SIGMA_NEXT) -> torch.Tensor:
    return solver_step(
        X[rows],
        DENOISED[rows],
        SIGMA[rows],
        sigma_next[rows],
        Ancestral(torch.tensor([solver == "euler_ancestral" for solver in solvers]), NOISE[rows]),
        SecondOrder(torch.tensor([solver == "dpmpp_2m" for solver in solvers]), BEFORE[rows], SIGMA_BEFORE[rows]),
    )


def test_euler_follows_the_slope():
    slope = (X - DENOISED) / per_row(SIGMA, X)
    torch.testing.assert_close(step(["euler"] * ROWS), X + slope * per_row(SIGMA_NEXT - SIGMA, X))
    torch.testing.assert_close(solver_step(X, DENOISED, SIGMA, SIGMA_NEXT), step(["euler"] * ROWS))


def test_mixed_rows_are_the_rows_alone():
    mixed = step(list(SOLVERS))
    for i, solver in enumerate(SOLVERS):
        assert torch.equal(mixed[i : i + 1], step([solver], slice(i, i + 1)))


def test_an_ancestral_step_ends_at_its_noise_level():
    """What is left of x - denoised and the noise that is added make up sigma_next together."""
    x, denoised, sigma, sigma_next = (
        torch.full((1, 4), 4.0),
        torch.zeros(1, 4),
        torch.tensor([4.0]),
        torch.tensor([2.0]),
    )
    still, moved = (
        solver_step(x, denoised, sigma, sigma_next, Ancestral(torch.tensor([True]), torch.full((1, 4), noise)))
        for noise in (0.0, 1.0)
    )
    assert (moved > still).all()
    torch.testing.assert_close((still**2 + (moved - still) ** 2).sqrt(), torch.full((1, 4), 2.0))


def test_every_sampler_ends_at_the_denoised_prediction():
    for solver in SOLVERS:
        torch.testing.assert_close(step([solver] * ROWS, sigma_next=torch.zeros(ROWS)), DENOISED)


def test_the_second_order_is_exact_where_predictions_change_evenly_in_log_sigma():
    """denoised = a + b log sigma along the way: DPM-Solver++ 2M needs a tenth of Euler's error at the same steps."""
    sigmas, start = torch.logspace(1, -1, 9, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    def end(second_order: bool, sigmas: torch.Tensor) -> float:
        x, before, sigma_before = start, start, sigmas[:1]
        for i in range(len(sigmas) - 1):
            sigma, denoised = sigmas[i : i + 1], sigmas[i].log().reshape(1, 1)
            second = torch.tensor([second_order and i > 0])
            extrapolated = SecondOrder(second, before, sigma_before)
            x = solver_step(x, denoised, sigma, sigmas[i + 1 : i + 2], second_order=extrapolated)
            before, sigma_before = denoised, sigma
        return x.item()

    exact = end(False, torch.logspace(1, -1, 20_001, dtype=torch.float64))
    assert abs(end(True, sigmas) - exact) < abs(end(False, sigmas) - exact) / 5

"""The samplers that training trajectories follow, under ComfyUI's names: one step for a batch of mixed rows."""

from dataclasses import dataclass

import torch

from ..agd_core.guidance import per_row

SOLVERS = ("euler", "euler_ancestral", "dpmpp_2m")


@dataclass(frozen=True)
class Ancestral:
    """Which `rows` (b,) go below sigma_next, and the `noise` (b, c, h, w) that brings them back up to it.

    `flow`: x is (1 - sigma) x_0 + sigma noise, as in flow matching, instead of x_0 + sigma noise.
    """

    rows: torch.Tensor
    noise: torch.Tensor
    flow: bool = False


@dataclass(frozen=True)
class SecondOrder:
    """Which `rows` (b,) extrapolate from the prediction made at `sigma_before` (b,): `before`, (b, c, h, w)."""

    rows: torch.Tensor
    before: torch.Tensor
    sigma_before: torch.Tensor


def solver_step(
    x: torch.Tensor,
    denoised: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    ancestral: Ancestral | None = None,
    second_order: SecondOrder | None = None,
) -> torch.Tensor:
    """One step of dx/dsigma = (x - denoised) / sigma (Karras et al. 2022) from sigma to sigma_next, (b,) each.

    Plain rows take Euler's step. x, denoised: (b, c, h, w).
    """
    aim = denoised if second_order is None else _extrapolated(x, denoised, sigma, sigma_next, second_order)
    if ancestral is None:
        return _euler(x, aim, sigma, sigma_next)
    if ancestral.flow:
        return _flow_ancestral(x, aim, sigma, sigma_next, ancestral)
    up = _noise_added(ancestral.rows, sigma, sigma_next)
    down = (sigma_next**2 - up**2).clamp(min=0).sqrt() if ancestral.rows.any() else sigma_next
    return _euler(x, aim, sigma, down) + ancestral.noise * per_row(up, x)


def _flow_ancestral(
    x: torch.Tensor, aim: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, ancestral: Ancestral
) -> torch.Tensor:
    """Below by as much again, and back with x_0's share of x as it has to be at sigma_next."""
    down = torch.where(ancestral.rows, sigma_next**2 / sigma, sigma_next)
    share = torch.where(ancestral.rows, (1 - sigma_next) / (1 - down), torch.ones_like(sigma))
    up = (sigma_next**2 - (share * down) ** 2).clamp(min=0).sqrt()
    return per_row(share, x) * _euler(x, aim, sigma, down) + ancestral.noise * per_row(up, x)


def _euler(x: torch.Tensor, aim: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    kept = per_row(sigma_next / sigma, x)
    return kept * x + (1 - kept) * aim


def _noise_added(rows: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """The noise level (b,) of what an ancestral step adds; 0 for other rows."""
    most = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).clamp(min=0).sqrt()
    return torch.where(rows, torch.minimum(sigma_next, most), torch.zeros_like(sigma))


def _extrapolated(
    x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, second_order: SecondOrder
) -> torch.Tensor:
    """What those rows step towards (DPM-Solver++ 2M, Lu et al. 2022, arXiv 2211.01095, in log sigma)."""
    if not second_order.rows.any():
        return denoised
    sigma_before = second_order.sigma_before
    ratio = (sigma_next / sigma).log() / (sigma / sigma_before).log()
    known = second_order.rows & (sigma_next > 0) & (sigma < sigma_before)  # a schedule may stay at one level
    share = torch.where(known, ratio / 2, torch.zeros_like(sigma))
    return denoised + per_row(share, x) * (denoised - second_order.before)

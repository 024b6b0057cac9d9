"""The samplers that training trajectories follow, under ComfyUI's names: one step for a batch of mixed rows."""

import torch

from ..agd_core.guidance import per_row

SOLVERS = ("euler", "euler_ancestral", "dpmpp_2m")


def solver_step(
    x: torch.Tensor,
    denoised: torch.Tensor,
    sigma: torch.Tensor,
    sigma_next: torch.Tensor,
    *,
    ancestral: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    second_order: torch.Tensor | None = None,
    before: torch.Tensor | None = None,
    sigma_before: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of dx/dsigma = (x - denoised) / sigma (Karras et al. 2022) from sigma to sigma_next, (b,) each.

    Plain rows take Euler's step. `ancestral` rows (b,) go below sigma_next and add `noise` back up to it.
    `second_order` rows (b,) extrapolate the denoised prediction from the one `before`, made at `sigma_before`
    (DPM-Solver++ 2M, Lu et al. 2022, in log sigma). x, denoised, before and noise: (b, c, h, w).
    """
    aim = denoised
    if second_order is not None and second_order.any():
        ratio = (sigma_next / sigma).log() / (sigma / sigma_before).log()
        known = second_order & (sigma_next > 0) & (sigma < sigma_before)  # a schedule may stay at one level
        share = torch.where(known, ratio / 2, torch.zeros_like(sigma))
        aim = denoised + per_row(share, x) * (denoised - before)
    down, up = sigma_next, torch.zeros_like(sigma)
    if ancestral is not None and ancestral.any():
        most = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).clamp(min=0).sqrt()
        up = torch.where(ancestral, torch.minimum(sigma_next, most), up)
        down = (sigma_next**2 - up**2).clamp(min=0).sqrt()
    kept = per_row(down / sigma, x)
    x = kept * x + (1 - kept) * aim
    return x if noise is None else x + noise * per_row(up, x)

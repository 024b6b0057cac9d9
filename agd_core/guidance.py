"""Guidance as pure functions of tensors, and how far a student has come.

`cond` is f(x, sigma, c), `uncond` f(x, sigma, c_neg), `target` the guided prediction, `student` f_psi; all are
denoised predictions of one shape (b, ...), in the notation of arXiv 2503.07274.
"""

import torch

_SMALL_GAP = 0.02  # of the batch's mean gap: where `balanced_weights` begins to trust a row less


def cfg(cond: torch.Tensor, uncond: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): uncond + omega (cond - uncond). omega: (b,)."""
    return uncond + per_row(omega, cond) * (cond - uncond)


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(b,) -> (b, 1, 1, ...), broadcastable to `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like)


def square_norm(x: torch.Tensor) -> torch.Tensor:
    """||x||^2 of each row: (b, ...) -> (b,), fp32."""
    return x.float().flatten(1).square().sum(1)


def gaps(cond: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """||eps of the target - eps of cond||^2 of each row: (b,). sigma: (b,)."""
    return square_norm((target - cond) / per_row(sigma, target))


def balanced_weights(gap: torch.Tensor, mean_gap: torch.Tensor) -> torch.Tensor:
    """The weights (b,) with which every row's error counts about alike, for rows with those `gaps` (b,).

    Plain MSE grows with (omega - 1)^2 and, of denoised predictions, with sigma^2. Here errors are those of eps, and
    each row is divided by its own gap. Rows whose gap is far below the batch's mean, those of omega near 1, count
    less: there the rounding errors of a bf16 base are larger than the gap.
    """
    return 1 / (gap + _SMALL_GAP * mean_gap + 1e-12)


def weighted_error(
    student: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The sum over rows of weight times ||eps error||^2: a loss that parts of a batch add up to. weights: (b,)."""
    return (weights * square_norm((student - target) / per_row(sigma, target))).sum()


def gap_closed(student: torch.Tensor, cond: torch.Tensor, target: torch.Tensor) -> float:
    """1 - sum ||student - target||^2 / sum ||cond - target||^2: 0 is no guidance, 1 exactly the target."""
    open_now, open_before = square_norm(student - target).sum(), square_norm(cond - target).sum()
    if open_before == 0:
        raise ValueError("The gap between the unguided and the guided prediction is zero, so no share of it exists.")
    return 1 - (open_now / open_before).item()


def direction_cosine(student: torch.Tensor, cond: torch.Tensor, target: torch.Tensor) -> float:
    """Mean cosine between what the student adds, student - cond, and what guidance adds, target - cond."""
    added, wanted = (student - cond).float().flatten(1), (target - cond).float().flatten(1)
    return torch.cosine_similarity(added, wanted, dim=1).mean().item()

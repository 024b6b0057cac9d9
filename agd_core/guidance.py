"""Guidance as pure functions of tensors, and how far a student has come.

`cond` is f(x, sigma, c), `uncond` f(x, sigma, c_neg), `target` the guided prediction, `student` f_psi; all are
denoised predictions of one shape (b, ...), in the notation of arXiv 2503.07274. sigma, omega: (b,).

A teacher's rule has to be a function of the state alone, for a student sees nothing else, and to give `cond` at
omega 1, for what an adapter adds carries a factor (omega - 1).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

RULES = ("cfg", "interval", "rescale", "apg", "cfg_zero")
_SDXL_VALUES = 4 * 128 * 128  # of its latents at 1024 x 1024 pixels
_TINY = 1e-20
_SMALL_GAP = 0.02  # of the batch's mean gap: where `balanced_weights` begins to trust a row less


def cfg(cond: torch.Tensor, uncond: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): uncond + omega (cond - uncond). omega: (b,)."""
    return uncond + per_row(omega, cond) * (cond - uncond)


def interval(
    sigma: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor, omega: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Guidance in a limited interval (Kynkäänniemi et al. 2024, arXiv 2404.07724, eq. 5 and 6): `cfg` where
    low < sigma <= high, else `cond` itself.
    """
    inside = (sigma > low) & (sigma <= high)
    return torch.where(per_row(inside, cond).bool(), cfg(cond, uncond, omega), cond)


def rescale(
    x: torch.Tensor, sigma: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor, omega: torch.Tensor, phi: float
) -> torch.Tensor:
    """Rescaled guidance (Lin et al. 2024, arXiv 2305.08891, section 3.4): v_cfg (phi std(v_c) / std(v_cfg) + 1 - phi).

    std is over all values of a row. As in the paper, and in ComfyUI's RescaleCFG for bases of any prediction, it is v
    that is rescaled, for x = x_0 + sigma eps: denoised = x / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1).
    """
    guided, middle = cfg(cond, uncond, omega), x / (per_row(sigma, x) ** 2 + 1)
    of_cond, of_guided = ((middle - denoised).float().flatten(1).std(1) for denoised in (cond, guided))  # v's, scaled
    factor = phi * of_cond / of_guided.clamp_min(_TINY) + 1 - phi
    return middle - per_row(factor, x) * (middle - guided)


def apg(
    cond: torch.Tensor, uncond: torch.Tensor, omega: torch.Tensor, eta: float = 0.0, threshold: float = 15.0
) -> torch.Tensor:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1): cond + (omega - 1) d, where d is
    cond - uncond, no longer than `threshold`, with its part along `cond` times `eta`.

    `threshold`, the paper's r, is meant for latents of SDXL's size; norms grow with the root of the number of values,
    and so does the limit. Without the paper's momentum: it depends on the steps before, which a student can't see.
    """
    update = cond - uncond
    limit = threshold * (cond[0].numel() / _SDXL_VALUES) ** 0.5
    update = update * per_row((limit / _dot(update, update).sqrt().clamp_min(_TINY)).clamp_max(1), update)
    along = per_row(_dot(update, cond) / _dot(cond, cond).clamp_min(_TINY), cond) * cond
    return cond + per_row(omega - 1, cond) * (update - (1 - eta) * along)


def cfg_zero(x: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): `cfg` of eps_c and s eps_u, s = <eps_c, eps_u> / ||eps_u||^2.

    eps = (x - denoised) / sigma is also the velocity of a flow model, which the paper writes. Without the paper's
    zero-init: that is a rule about a sampler's first steps, not about a state.
    """
    of_cond, of_uncond = x - cond, x - uncond  # eps times sigma
    scale = _dot(of_cond, of_uncond) / _dot(of_uncond, of_uncond).clamp_min(_TINY)
    return cfg(cond, x - per_row(scale, x) * of_uncond, omega)


@dataclass(frozen=True)
class GuidanceRule:
    """What a teacher makes of both predictions: one of `RULES`, with the settings of all.

    The interval's default is the paper's for SDXL, whose noise levels SD 1.x and 2.x share; phi and r are the papers'.
    """

    name: str = "cfg"
    sigma_min: float = 0.28
    sigma_max: float = 5.42
    phi: float = 0.7
    eta: float = 0.0
    threshold: float = 15.0

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor, omega: torch.Tensor
    ) -> torch.Tensor:
        """The guided prediction at x (b, ...): as `cond`, of its shape."""
        if self.name == "interval":
            return interval(sigma, cond, uncond, omega, self.sigma_min, self.sigma_max)
        if self.name == "rescale":
            return rescale(x, sigma, cond, uncond, omega, self.phi)
        if self.name == "apg":
            return apg(cond, uncond, omega, self.eta, self.threshold)
        if self.name == "cfg_zero":
            return cfg_zero(x, cond, uncond, omega)
        return cfg(cond, uncond, omega)

    def guides_at(self, sigma: torch.Tensor) -> torch.Tensor:
        """Whether there is guidance at these noise levels: (b,) each."""
        inside = (sigma > self.sigma_min) & (sigma <= self.sigma_max)
        return inside if self.name == "interval" else torch.ones_like(inside)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> of each row: (b, ...) -> (b,), fp32."""
    return (a.float() * b.float()).flatten(1).sum(1)


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(b,) -> (b, 1, 1, ...), broadcastable to `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like)


def square_norm(x: torch.Tensor) -> torch.Tensor:
    """||x||^2 of each row: (b, ...) -> (b,), fp32."""
    return x.float().flatten(1).square().sum(1)


def gaps(cond: torch.Tensor, target: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """||target - cond||^2 of each row, of what the base predicts: (b,).

    unit: (b,), the error of the denoised prediction that an error of 1 in what the base predicts makes; of eps: sigma.
    """
    return square_norm((target - cond) / per_row(unit, target))


def balanced_weights(gap: torch.Tensor, mean_gap: torch.Tensor) -> torch.Tensor:
    """The weights (b,) with which every row's error counts about alike, for rows with those `gaps` (b,).

    Plain MSE grows with (omega - 1)^2 and, of denoised predictions, with sigma^2. Here errors are those of what the
    base predicts, and each row is divided by its own gap. Rows whose gap is far below the batch's mean, those of omega
    near 1, count less: there the rounding errors of a bf16 base are larger than the gap. Rows without any gap, which
    the teacher doesn't guide, count like a mean row: what a student adds there is as wrong as it is large. A batch of
    only such rows has no measure of large; it doesn't count.
    """
    weights = 1 / (torch.where(gap == 0, mean_gap, gap) + _SMALL_GAP * mean_gap + 1e-12)
    return torch.where(mean_gap == 0, 0.0, weights)


def weighted_error(
    student: torch.Tensor, target: torch.Tensor, unit: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The sum over rows of weight times ||error of what the base predicts||^2: a loss that parts of a batch add up to.

    unit: (b,), as for `gaps`; weights: (b,).
    """
    return (weights * square_norm((student - target) / per_row(unit, target))).sum()


class GapErrors(NamedTuple):
    """How far a student is from its teacher, by row: (b,) each, fp32.

    `remaining`: ||student - target||^2; `total`: ||cond - target||^2, the gap without an adapter; `cosine`: between
    what the student adds to `cond` and what guidance does, NaN where that is nothing.
    """

    remaining: torch.Tensor
    total: torch.Tensor
    cosine: torch.Tensor


def gap_errors(student: torch.Tensor, cond: torch.Tensor, target: torch.Tensor) -> GapErrors:
    added, wanted = student - cond, target - cond
    total = square_norm(wanted)
    cosine = torch.cosine_similarity(added.float().flatten(1), wanted.float().flatten(1), dim=1)
    return GapErrors(square_norm(student - target), total, cosine.where(total > 0, torch.nan))


def share_closed(errors: GapErrors) -> float:
    """1 - sum ||student - target||^2 / sum ||cond - target||^2: 0 is no guidance, 1 exactly the target."""
    total = errors.total.sum()
    if total == 0:
        raise ValueError("The gap between the unguided and the guided prediction is zero, so no share of it exists.")
    return 1 - (errors.remaining.sum() / total).item()


def mean_cosine(errors: GapErrors) -> float:
    """Over the rows that are guided."""
    return errors.cosine[errors.total > 0].mean().item()


def gap_closed(student: torch.Tensor, cond: torch.Tensor, target: torch.Tensor) -> float:
    """`share_closed` of these predictions."""
    return share_closed(gap_errors(student, cond, target))


def direction_cosine(student: torch.Tensor, cond: torch.Tensor, target: torch.Tensor) -> float:
    """Mean cosine between what the student adds, student - cond, and what guidance does, target - cond, if it does."""
    return mean_cosine(gap_errors(student, cond, target))

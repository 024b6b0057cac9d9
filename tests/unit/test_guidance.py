"""Guidance and gap on cases whose answers are known."""

import math

import pytest
import torch

from comfyui_agd.agd_core.guidance import (
    RULES,
    GuidanceRule,
    apg,
    balanced_weights,
    cfg,
    cfg_zero,
    direction_cosine,
    gap_closed,
    gaps,
    interval,
    rescale,
    weighted_error,
)

torch.manual_seed(0)
COND, UNCOND = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
OMEGA = torch.tensor([1.0, 2.0, 7.5])
TARGET = cfg(COND, UNCOND, OMEGA)


def test_cfg_extrapolates_from_uncond_through_cond():
    torch.testing.assert_close(TARGET[0], COND[0])
    torch.testing.assert_close(TARGET[1], 2 * COND[1] - UNCOND[1])
    torch.testing.assert_close(TARGET[2], UNCOND[2] + 7.5 * (COND[2] - UNCOND[2]))


@pytest.mark.parametrize(("share", "closed"), [(0.0, 0.0), (0.5, 0.75), (1.0, 1.0), (2.0, 0.0), (-1.0, -3.0)])
def test_gap_closed_of_a_student_part_of_the_way(share, closed):
    student = COND + share * (TARGET - COND)
    assert gap_closed(student, COND, TARGET) == pytest.approx(closed, abs=1e-5)


def test_gap_closed_needs_a_gap():
    with pytest.raises(ValueError, match="gap between the unguided and the guided prediction is zero"):
        gap_closed(COND, COND, COND)


@pytest.mark.parametrize(("share", "cosine"), [(0.1, 1.0), (3.0, 1.0), (-1.0, -1.0)])
def test_direction_cosine_ignores_length(share, cosine):
    cond, target = COND[1:], TARGET[1:]
    assert direction_cosine(cond + share * (target - cond), cond, target) == pytest.approx(cosine, abs=1e-5)


SIGMA = torch.tensor([1.0, 0.5, 8.0])


def test_a_gap_is_that_of_eps_whatever_the_noise_level():
    """eps = (x - denoised) / sigma: the same eps error at two noise levels is the same gap."""
    eps = torch.randn(1, 4, 5, 6).expand(3, 4, 5, 6)
    target = COND + eps * SIGMA[:, None, None, None]
    torch.testing.assert_close(gaps(COND, target, SIGMA), eps.square().sum((1, 2, 3)))


def test_the_weighted_error_of_a_batch_is_the_sum_of_its_parts():
    weights, student = torch.tensor([0.5, 1.0, 2.0]), COND + 0.1
    parts = [weighted_error(*(v[i : i + 1] for v in (student, TARGET, SIGMA, weights))).item() for i in range(3)]
    assert weighted_error(student, TARGET, SIGMA, weights).item() == pytest.approx(sum(parts), rel=1e-6)


def test_balanced_weights_count_rows_alike_and_hardly_those_without_guidance():
    """A row's weight times its gap is its part in the loss: alike for weak and strong guidance, small at omega 1."""
    target = cfg(COND, UNCOND, torch.tensor([1.001, 2.0, 12.0]))
    gap = gaps(COND, target, torch.ones(3))
    parts = balanced_weights(gap, gap.mean()) * gap
    assert parts[1].item() == pytest.approx(parts[2].item(), rel=0.6)
    assert gap[2] > 100 * gap[1]
    assert parts[0] < 1e-3


def test_balanced_weights_of_a_batch_without_guidance_are_zero():
    """It says nothing of how large an error is."""
    assert balanced_weights(torch.zeros(3), torch.tensor(0.0)).tolist() == [0, 0, 0]


def test_a_row_that_is_not_guided_counts_like_a_mean_row():
    gap = torch.tensor([0.0, 2.0, 4.0])
    weights = balanced_weights(gap, gap.mean())
    assert weights[0].item() == pytest.approx(weights[1].item())
    assert weights[1] > weights[2]


def test_direction_cosine_is_that_of_the_rows_that_are_guided():
    target = torch.cat([TARGET[1:2], COND[2:]])
    assert direction_cosine(TARGET[1:], COND[1:], target) == pytest.approx(1.0, abs=1e-5)


# -- Better teachers

X = COND + SIGMA[:, None, None, None] * torch.randn(3, 4, 5, 6)
STRONG = torch.tensor([3.0, 7.5, 12.0])


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum((1, 2, 3))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_cond_at_omega_1_and_not_above(name):
    rule = GuidanceRule(name, sigma_min=0.0, sigma_max=math.inf)
    torch.testing.assert_close(rule(X, SIGMA, COND, UNCOND, torch.ones(3)), COND)
    assert rule(X, SIGMA, COND, UNCOND, STRONG).shape == COND.shape
    assert ((rule(X, SIGMA, COND, UNCOND, STRONG) - COND).abs().amax((1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize("name", RULES)
def test_every_rule_treats_each_row_by_itself(name):
    rule = GuidanceRule(name)
    whole = rule(X, SIGMA, COND, UNCOND, STRONG)
    for i in range(3):
        torch.testing.assert_close(whole[i : i + 1], rule(*(v[i : i + 1] for v in (X, SIGMA, COND, UNCOND, STRONG))))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_finite_where_both_predictions_agree(name):
    for prediction in (COND, torch.zeros_like(COND), X, X / (SIGMA[:, None, None, None] ** 2 + 1)):  # the last: v = 0
        guided = GuidanceRule(name)(X, SIGMA, prediction, prediction, STRONG)
        torch.testing.assert_close(guided, prediction, rtol=1e-4, atol=1e-4)


def test_a_rule_is_its_function_with_its_settings():
    settings = {"sigma_min": 0.5, "sigma_max": 2.0, "phi": 0.3, "eta": 0.4, "threshold": 5.0}
    args = COND, UNCOND, STRONG
    expected = {
        "cfg": cfg(*args),
        "interval": interval(SIGMA, *args, 0.5, 2.0),
        "rescale": rescale(X, SIGMA, *args, 0.3),
        "apg": apg(*args, 0.4, 5.0),
        "cfg_zero": cfg_zero(X, *args),
    }
    assert tuple(expected) == RULES
    for name, guided in expected.items():
        assert torch.equal(GuidanceRule(name, **settings)(X, SIGMA, *args), guided)


def test_interval_is_cfg_inside_and_cond_outside_without_its_lower_end():
    guided = interval(torch.tensor([0.28, 0.3, 5.42]), COND, UNCOND, STRONG, 0.28, 5.42)
    expected = cfg(COND, UNCOND, STRONG)
    assert torch.equal(guided[0], COND[0])
    assert torch.equal(guided[1:], expected[1:])
    assert torch.equal(interval(torch.full((3,), 5.43), COND, UNCOND, STRONG, 0.28, 5.42), COND)


def as_v(denoised: torch.Tensor) -> torch.Tensor:
    """v = alpha eps - (1 - alpha^2)^(1/2) x_0 of the variance-preserving process, alpha^2 = 1 / (sigma^2 + 1)."""
    sigma = SIGMA[:, None, None, None]
    eps, alpha = (X - denoised) / sigma, 1 / (sigma**2 + 1).sqrt()
    return alpha * eps - sigma * alpha * denoised


def test_rescale_at_phi_1_keeps_the_spread_of_conds_v():
    guided = rescale(X, SIGMA, COND, UNCOND, STRONG, 1.0)
    torch.testing.assert_close(as_v(guided).std((1, 2, 3)), as_v(COND).std((1, 2, 3)))
    assert (as_v(cfg(COND, UNCOND, STRONG)).std((1, 2, 3)) > 1.5 * as_v(COND).std((1, 2, 3))).all()


def test_rescale_is_the_papers_mean_of_rescaled_and_plain_guidance_in_v():
    of_cond, of_cfg = as_v(COND), cfg(as_v(COND), as_v(UNCOND), STRONG)
    ratio = (of_cond.std((1, 2, 3)) / of_cfg.std((1, 2, 3)))[:, None, None, None]
    torch.testing.assert_close(
        as_v(rescale(X, SIGMA, COND, UNCOND, STRONG, 0.7)), 0.7 * ratio * of_cfg + 0.3 * of_cfg, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(rescale(X, SIGMA, COND, UNCOND, STRONG, 0.0), cfg(COND, UNCOND, STRONG))


def test_apg_without_limit_and_projection_is_cfg():
    torch.testing.assert_close(apg(COND, UNCOND, STRONG, 1.0, math.inf), cfg(COND, UNCOND, STRONG))


def test_apg_adds_only_what_is_orthogonal_to_cond_and_eta_of_what_is_along():
    change = cfg(COND, UNCOND, STRONG) - COND
    for eta in (0.0, 0.3):
        added = apg(COND, UNCOND, STRONG, eta, math.inf) - COND
        torch.testing.assert_close(dot(added, COND), eta * dot(change, COND), rtol=1e-4, atol=1e-2)
        left = change - added  # along cond, all of it
        torch.testing.assert_close(dot(left, COND) ** 2, dot(left, left) * dot(COND, COND), rtol=1e-4, atol=1e-2)


def test_apg_limits_the_norm_of_the_difference_by_what_sdxls_latents_would_have():
    threshold = 100.0
    limit = threshold * (COND[0].numel() / (4 * 128 * 128)) ** 0.5
    near = COND + 0.01 * (UNCOND - COND)
    for uncond, norm in ((UNCOND, limit), (near, (COND - near).square().sum((1, 2, 3)).sqrt())):
        added = apg(COND, uncond, STRONG, 1.0, threshold) - COND
        expected = (STRONG - 1) * norm
        torch.testing.assert_close(added.square().sum((1, 2, 3)).sqrt(), expected, rtol=1e-3, atol=1e-3)
    shortened = apg(COND, UNCOND, STRONG, 1.0, 1.0)
    assert direction_cosine(shortened, COND, cfg(COND, UNCOND, STRONG)) == pytest.approx(1, abs=1e-3)


def test_cfg_zero_is_cfg_where_the_best_scale_is_1():
    """eps_c = eps_u + something orthogonal to it."""
    eps = X - UNCOND
    other = torch.randn_like(eps)
    other = other - (dot(other, eps) / dot(eps, eps))[:, None, None, None] * eps
    cond = X - (eps + other)
    torch.testing.assert_close(cfg_zero(X, cond, UNCOND, STRONG), cfg(cond, UNCOND, STRONG), rtol=1e-4, atol=1e-3)


def test_cfg_zero_extrapolates_from_the_nearest_multiple_of_uncond():
    """So what is added to eps_c is orthogonal to eps_u; where eps_c is such a multiple, nothing is."""
    added = X - cfg_zero(X, COND, UNCOND, STRONG) - (X - COND)
    torch.testing.assert_close(dot(added, X - UNCOND), torch.zeros(3), rtol=0, atol=0.05)
    assert (added.square().sum((1, 2, 3)) > 1).all()
    multiple = X - 0.7 * (X - UNCOND)
    torch.testing.assert_close(cfg_zero(X, multiple, UNCOND, STRONG), multiple, rtol=1e-4, atol=1e-4)

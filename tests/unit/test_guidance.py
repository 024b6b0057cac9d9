"""Guidance and gap on cases whose answers are known."""

import pytest
import torch

from comfyui_agd.agd_core.guidance import (
    balanced_weights,
    cfg,
    direction_cosine,
    gap_closed,
    gaps,
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


def test_balanced_weights_of_a_batch_without_guidance_are_finite():
    assert balanced_weights(torch.zeros(3), torch.tensor(0.0)).isfinite().all()

"""Guidance and gap on cases whose answers are known."""

import pytest
import torch

from comfyui_agd.agd_core.guidance import balanced_loss, cfg, direction_cosine, gap_closed, plain_loss

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


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_balanced_loss_is_the_share_of_the_gap_that_is_open(share):
    student = COND + share * (TARGET - COND)
    assert balanced_loss(student, COND, TARGET, SIGMA).item() == pytest.approx((1 - share) ** 2, abs=1e-5)


def test_balanced_loss_weighs_small_and_large_guidance_alike():
    """Half of row 1 done and nothing of row 2, and the other way round, cost the same; under MSE they do not."""
    losses, plain = [], []
    for done in (1, 2):
        student = COND.clone()
        student[done] = TARGET[done]
        losses.append(balanced_loss(student, COND, TARGET, SIGMA).item())
        plain.append(plain_loss(student, COND, TARGET, torch.ones(3)).item())
    assert losses == pytest.approx([0.5, 0.5], abs=0.15)
    assert max(plain) > 10 * min(plain)


def test_balanced_loss_hardly_hears_rounding_errors_at_omega_near_1():
    target = cfg(COND, UNCOND, torch.tensor([1.001, 2.0, 2.0]))
    student = target.clone()
    student[0] += 0.01 * torch.randn(4, 5, 6)
    assert balanced_loss(student, COND, target, torch.ones(3)).item() < 0.01


def test_balanced_loss_survives_a_batch_without_guidance():
    assert torch.isfinite(balanced_loss(COND, COND, COND, SIGMA))

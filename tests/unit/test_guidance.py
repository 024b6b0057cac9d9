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


def test_balanced_loss_weighs_every_omega_alike():
    student = COND + 0.5 * (TARGET - COND)
    torch.testing.assert_close(balanced_loss(student, COND, TARGET)[1:], torch.full((2,), 0.25))
    plain = plain_loss(student, COND, TARGET)
    assert plain[2] > 10 * plain[1]


def test_balanced_loss_survives_omega_1():
    assert torch.isfinite(balanced_loss(COND, COND, COND)).all()

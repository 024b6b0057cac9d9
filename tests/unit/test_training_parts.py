"""The trainer's parts that need no model."""

import pytest
import torch

from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.plot import loss_plot, smooth
from comfyui_agd.training.pool import euler_step
from comfyui_agd.training.trainer import learning_rate, split_prompts


def test_learning_rate_rises_then_falls_to_zero():
    config = TrainConfig(iterations=100, learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def step(ancestral: bool, noise: torch.Tensor, sigma_next: float = 2.0) -> torch.Tensor:
    x, denoised = torch.full((1, 4), 3.0), torch.ones(1, 4)
    sigma = torch.tensor([4.0])
    return euler_step(x, denoised, sigma, torch.tensor([sigma_next]), torch.tensor([ancestral]), noise)


def test_euler_step_follows_the_straight_line_to_denoised():
    torch.testing.assert_close(step(False, torch.randn(1, 4)), torch.full((1, 4), 2.0))
    torch.testing.assert_close(step(False, torch.randn(1, 4), sigma_next=0.0), torch.ones(1, 4))


def test_an_ancestral_step_ends_at_the_same_noise_level():
    still, moved = step(True, torch.zeros(1, 4)), step(True, torch.ones(1, 4))
    down = 4.0 * (still - 1.0) / 2.0  # x - denoised shrank from 2 at sigma 4
    up = moved - still
    torch.testing.assert_close((down**2 + up**2).sqrt(), torch.full((1, 4), 2.0))


def test_an_ancestral_step_to_zero_adds_no_noise():
    torch.testing.assert_close(step(True, torch.ones(1, 4), sigma_next=0.0), torch.ones(1, 4))


def test_held_out_prompts_are_kept_apart():
    prompts = [f"prompt {i}" for i in range(20)]
    training, held_out = split_prompts(prompts, TrainConfig(held_out=4))
    assert len(held_out) == 4
    assert sorted(training + held_out) == sorted(prompts)


def test_few_prompts_are_all_trained():
    assert split_prompts(["one", " ", "two"], TrainConfig(held_out=8))[1] == []


def test_no_prompts():
    with pytest.raises(ValueError, match="no prompts to train with"):
        split_prompts(["", "  "], TrainConfig())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": 0}, "iterations is 0, but must be above 0"),
        ({"omega_min": 5.0, "omega_max": 2.0}, "omega goes from 5.0 to 2.0"),
        ({"steps_min": 9, "steps_max": 3}, "steps_max is 3, less than steps_min, 9"),
        ({"loss": "mae"}, "loss is 'mae', but must be one of balanced, plain"),
        ({"ema": 1.5}, "ema is 1.5, but is a share"),
        ({"schedulers": ()}, "schedulers is empty"),
    ],
)
def test_settings_that_cannot_work_say_why(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)


def test_smooth_is_a_trailing_mean():
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize("losses", [[0.5], [0.0, 0.0], [1.0, 0.9, 30.0, 0.7]])
def test_any_history_can_be_plotted(losses):
    assert loss_plot(losses).size == (800, 480)

"""Forecasts of predictions: when one is made, and what it is."""

import math

import pytest
import torch

from comfyui_agd.agd_core.forecast import MOST_IN_A_ROW, Forecast

SIGMAS = torch.linspace(10.0, 0.5, 20).tolist()


def sampled(denoised, sigmas=SIGMAS, noise=1.0, forced=()):
    """The predictions of steps with these functions of sigma, and which of them were evaluated."""
    forecast, predictions, evaluated = Forecast(), [], []
    for i, sigma in enumerate(sigmas):

        def evaluate(i=i, sigma=sigma):
            evaluated.append(i)
            return (denoised(sigma),)

        x = denoised(sigma) + noise * sigma * torch.ones(4)
        (prediction,), forecast = forecast.step(sigma, x, evaluate, lambda found: found[0], evaluated=i in forced)
        predictions.append(prediction)
    return predictions, evaluated


def test_a_prediction_that_is_linear_in_sigma_is_forecast_exactly():
    predictions, evaluated = sampled(lambda sigma: torch.full((4,), 3.0 - 0.5 * sigma))
    assert evaluated == [0, 1, 2, *range(5, len(SIGMAS), MOST_IN_A_ROW + 1)]
    for sigma, found in zip(SIGMAS, predictions, strict=True):
        torch.testing.assert_close(found, torch.full((4,), 3.0 - 0.5 * sigma))


def test_a_prediction_that_changes_at_random_is_evaluated_at_every_step():
    generator = torch.Generator().manual_seed(0)
    values = {sigma: 20 * torch.randn(4, generator=generator) for sigma in SIGMAS}
    predictions, evaluated = sampled(values.__getitem__)
    assert evaluated == list(range(len(SIGMAS)))
    assert all(torch.equal(found, values[sigma]) for sigma, found in zip(SIGMAS, predictions, strict=True))


def test_a_curved_prediction_is_forecast_where_the_error_is_small_beside_the_noise():
    def curved(sigma):
        return torch.full((4,), 0.3 * sigma**2)

    assert len(sampled(curved, noise=100.0)[1]) < len(SIGMAS) / 2
    assert sampled(curved, noise=0.1)[1] == list(range(len(SIGMAS)))


def test_a_step_that_has_to_be_evaluated_is():
    def linear(sigma):
        return torch.full((4,), sigma)

    assert sampled(linear, forced=range(20))[1] == list(range(20))
    assert 4 in sampled(linear, forced=(4,))[1]
    assert 4 not in sampled(linear)[1]


def test_back_at_more_noise_what_had_less_is_forgotten():
    up_and_down = [10.0, 8.0, 6.0, 9.0, 7.0, 5.0, 3.0]
    assert sampled(lambda sigma: torch.full((4,), sigma), up_and_down)[1] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_forecast_from_what_is_not_finite(value):
    assert sampled(lambda sigma: torch.full((4,), value))[1] == list(range(len(SIGMAS)))


@pytest.mark.parametrize(("scale", "forecasts"), [(1.0, True), (200.0, False)])
def test_the_error_that_counts_is_that_of_the_guided_prediction(scale, forecasts):
    """Of predictions that part in a curve: guided strongly, their difference's error is many times as large."""

    def guided(predictions):
        return predictions[1] + scale * (predictions[0] - predictions[1])

    forecast, evaluated = Forecast(), []
    for sigma in SIGMAS:
        both = torch.full((4,), sigma + 0.05 * sigma**2), torch.full((4,), sigma)
        x = guided(both) + sigma * torch.ones(4)
        found, forecast = forecast.step(sigma, x, lambda both=both: evaluated.append(1) or both, guided)
        assert len(found) == 2
    assert (len(evaluated) < len(SIGMAS)) == forecasts

"""Both predictions of CFG from fewer evaluations, on predictions that are known."""

import itertools
import math

import pytest
import torch

from comfyui_agd.agd_core.forecast import ForecastGuidance

DELTA = torch.tensor([[1.0, -2.0]])
SIGMAS = torch.linspace(8.0, 1.0, 15).tolist()


class Model:
    """Predictions that change by `drift` and `bend` of sigma, and differ by sigma^2 times `DELTA`, which grows."""

    def __init__(self, drift: float = 0.0, bend: float = 0.0, growth: float = 0.0):
        self.drift, self.bend, self.growth, self.asked = drift, bend, growth, []

    def exact(self, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        with_prompt = torch.full((1, 2), self.drift * sigma + self.bend * sigma**2)
        return with_prompt, with_prompt - sigma**2 * (1 - self.growth * sigma) * DELTA

    def at(self, sigma: float):
        def evaluate() -> list[torch.Tensor]:
            self.asked.append(sigma)
            return list(self.exact(sigma))

        return evaluate


def run(model: Model, sigmas: list[float] = SIGMAS, **how) -> list[tuple[torch.Tensor, torch.Tensor]]:
    guidance, found = ForecastGuidance(), []
    for sigma in sigmas:
        predictions, guidance = guidance.step(sigma, model.at(sigma), **how)
        found.append(predictions)
    return found


def test_after_three_evaluations_every_second_step_is_forecast():
    model = Model(drift=5.0)
    run(model)
    assert model.asked == SIGMAS[:3] + SIGMAS[4::2]


def test_forecasts_are_exact_where_the_prompts_prediction_and_the_difference_of_scores_are_linear():
    model = Model(drift=5.0, growth=0.1)
    for sigma, found in zip(SIGMAS, run(model), strict=True):
        torch.testing.assert_close(found, model.exact(sigma), rtol=1e-4, atol=1e-4)


def test_what_is_evaluated_is_given_as_it_is():
    model = Model(drift=5.0, bend=0.01)
    for sigma, found in zip(SIGMAS, run(model), strict=True):
        if sigma in model.asked:
            assert all(map(torch.equal, found, model.exact(sigma)))


def test_predictions_that_bend_are_evaluated_until_steps_are_close_enough():
    far, close = Model(bend=60.0), Model(bend=60.0)
    run(far)
    assert far.asked == SIGMAS
    near_steps = torch.linspace(8.0, 7.0, 15).tolist()
    run(close, near_steps)
    assert len(close.asked) < len(near_steps)


def test_a_change_that_is_not_steady_is_seen_at_the_next_evaluation():
    class Turning(Model):
        def exact(self, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(prediction + 500 * max(0.0, 5.0 - sigma) for prediction in super().exact(sigma))

    model = Turning()
    run(model)
    turn = next(i for i, sigma in enumerate(SIGMAS) if sigma < 5.0)
    seen = next(i for i in (turn, turn + 1) if SIGMAS[i] in model.asked)
    assert model.asked[model.asked.index(SIGMAS[seen]) + 1] == SIGMAS[seen + 1]


def test_where_noise_is_added_both_are_evaluated():
    class Noisy(Model):
        def exact(self, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
            noise = 500 * torch.randn(1, 2, generator=torch.Generator().manual_seed(round(1e6 * sigma)))
            return tuple(prediction + noise for prediction in super().exact(sigma))

    model = Noisy()
    run(model)
    assert model.asked == SIGMAS


def test_equal_prompts_are_evaluated():
    """There is nothing to measure an error by."""

    class Equal(Model):
        def exact(self, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
            return (torch.full((1, 2), math.sin(sigma)),) * 2

    model = Equal()
    run(model)
    assert model.asked == SIGMAS


def test_both_are_evaluated_where_it_is_asked_for():
    model = Model()
    run(model, evaluate_both=True)
    assert model.asked == SIGMAS


def test_steps_with_no_less_noise_are_forgotten():
    """At 5 again, and back at 6, where two evaluations with more noise are known still."""
    model = Model(drift=5.0)
    sigmas = [8.0, 7.5, 7.0, 6.5, 5.0, 6.0, 5.5, 5.0]
    guidance = ForecastGuidance()
    for sigma in sigmas:
        found, guidance = guidance.step(sigma, model.at(sigma), evaluate_both=sigma == 6.0)
        torch.testing.assert_close(found, model.exact(sigma), rtol=1e-4, atol=1e-4)
    assert model.asked == [8.0, 7.5, 7.0, 5.0, 6.0, 5.0]
    assert [step.sigma for step in guidance.evaluated] == [6.0, 5.0]


def test_a_first_step_that_is_far_away_does_not_make_errors_look_small():
    """Schedules of zero terminal SNR begin at a sigma of thousands, where predictions are those of pure noise."""

    class FromPureNoise(Model):
        def exact(self, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
            return super().exact(min(sigma, SIGMAS[0]))

    model = FromPureNoise(bend=60.0)
    run(model, [4500.0, *SIGMAS])
    assert model.asked[:8] == [4500.0, *SIGMAS[:7]]


class Mixture:
    """Exact denoised predictions of a mixture of Gaussians in the plane; the prompt says which of them.

    Its guided trajectories are stiff: they first head for the mean of all, then turn to a narrow mode.
    """

    means = torch.tensor([[4.0, 0.0], [-4.0, 1.0], [0.0, 5.0], [3.0, -4.0]])
    spread = 0.2

    def predict(self, x: torch.Tensor, sigma: float, modes: list[int]) -> torch.Tensor:
        """x (b, 2) -> (b, 2)."""
        means, variance = self.means[modes], self.spread**2
        weights = (-torch.cdist(x, means).square() / (2 * (variance + sigma**2))).softmax(1)
        shrunk = (variance * x[:, None] + sigma**2 * means) / (variance + sigma**2)
        return (weights[..., None] * shrunk).sum(1)

    def sample(self, omega: float, steps: int, forecast: bool) -> tuple[torch.Tensor, int]:
        """Where Euler ends, and how many steps were evaluated."""
        sigmas = [*torch.linspace(20.0 ** (1 / 3), 0.05 ** (1 / 3), steps).pow(3).tolist(), 0.0]
        x = 20 * torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
        guidance, evaluated = ForecastGuidance(), []
        for sigma, following in itertools.pairwise(sigmas):

            def evaluate(x=x, sigma=sigma):
                evaluated.append(sigma)
                return [self.predict(x, sigma, [0, 3]), self.predict(x, sigma, [0, 1, 2, 3])]

            (wanted, unwanted), guidance = guidance.step(sigma, evaluate, evaluate_both=not forecast)
            guided = unwanted + omega * (wanted - unwanted)
            x = x + (x - guided) * (following - sigma) / sigma
        return x, len(evaluated)


@pytest.mark.parametrize("omega", [2.0, 5.0, 10.0])
@pytest.mark.parametrize("steps", [12, 20, 40])
def test_where_trajectories_turn_it_is_no_further_from_cfg_than_cfg_with_as_many_evaluations(omega, steps):
    true, _ = Mixture().sample(omega, 400, forecast=False)
    found, evaluated = Mixture().sample(omega, steps, forecast=True)
    cfg, _ = Mixture().sample(omega, evaluated, forecast=False)
    assert evaluated < steps
    assert (found - true).norm() <= (cfg - true).norm()

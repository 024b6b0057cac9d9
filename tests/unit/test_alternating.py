"""Both predictions from one evaluation at a time, on predictions that are known."""

import pytest
import torch

from comfyui_agd.agd_core.alternating import NEAR, AlternatingGuidance

DELTA = torch.tensor([[1.0, -2.0]])
STEP = NEAR / 2


class Model:
    """Predictions that change together by `drift` from 0 to 1, and by `growth` of DELTA towards each other."""

    def __init__(self, drift: float = 0.0, growth: float = 0.0):
        self.drift, self.growth, self.asked = drift, growth, []

    def exact(self, position: float) -> tuple[torch.Tensor, torch.Tensor]:
        negative = torch.full((1, 2), self.drift * position)
        return negative + (1 + self.growth * position) * DELTA, negative

    def at(self, position: float):
        def evaluate(*turns: bool) -> list[torch.Tensor]:
            self.asked.append(turns)
            return [self.exact(position)[0 if turn else 1] for turn in turns]

        return evaluate


def run(model: Model, positions) -> list[tuple[torch.Tensor, torch.Tensor]]:
    guidance = AlternatingGuidance()
    return [guidance(position, model.at(position)) for position in positions]


def even(count: int, start: float = 0.0) -> list[float]:
    return [start + STEP * i for i in range(count)]


def test_prompt_and_negative_take_turns():
    model = Model()
    run(model, even(4))
    assert model.asked == [(True,), (False,), (True,), (False,)]


def test_what_is_evaluated_is_given_as_it_is():
    model, positions = Model(drift=3.0, growth=1.0), even(6)
    for i, found in list(enumerate(run(model, positions)))[2:]:
        assert torch.equal(found[i % 2], model.exact(positions[i])[i % 2])


@pytest.mark.parametrize("drift", [0.0, 40.0])
def test_the_other_is_exact_where_both_change_together_at_a_steady_rate(drift):
    model, positions = Model(drift), even(7)
    for position, found in list(zip(positions, run(model, positions), strict=True))[2:]:
        torch.testing.assert_close(found, model.exact(position))


def test_a_difference_that_changes_is_that_of_the_step_before():
    model, positions = Model(drift=5.0, growth=1.0), even(7)
    found = run(model, positions)
    for i in range(2, len(positions)):
        positive, negative = found[i]
        torch.testing.assert_close(positive - negative, (1 + positions[i - 1]) * DELTA)


def test_from_pure_noise_there_is_no_guidance_before_both_are_known():
    model = Model(drift=5.0)
    (first, second, *_) = run(model, even(3))
    assert all(torch.equal(given, model.exact(0.0)[0]) for given in (*first, *second))


def test_a_sampling_that_begins_later_begins_with_both():
    model = Model(drift=5.0)
    positions = even(4, start=0.5)
    found = run(model, positions)
    assert model.asked == [(True, False), (True,), (False,), (True,)]
    for position, given in zip(positions, found, strict=True):
        torch.testing.assert_close(given, model.exact(position))


def test_steps_that_are_far_apart_evaluate_both():
    model, positions = Model(drift=5.0, growth=3.0), [0.0, 2 * NEAR, 4 * NEAR]
    found = run(model, positions)
    assert model.asked == [(True,), (True, False), (True, False)]
    for position, given in list(zip(positions, found, strict=True))[1:]:
        torch.testing.assert_close(given, model.exact(position), rtol=0, atol=0)


def test_so_does_a_step_back_to_more_noise():
    model = Model()
    run(model, [*even(3), 0.0 + STEP, *even(2, start=0.8), 0.3])
    assert model.asked[-1] == (True, False)
    assert model.asked[3] == (False,)  # a little more noise is near


class Noisy(Model):
    """Every step has noise of its own, in both predictions alike."""

    def exact(self, position: float) -> tuple[torch.Tensor, torch.Tensor]:
        noise = 5 * torch.randn(1, 2, generator=torch.Generator().manual_seed(round(1e6 * position)))
        return tuple(prediction + noise for prediction in super().exact(position))


def test_where_noise_is_added_every_second_step_evaluates_both():
    model, positions = Noisy(), even(12)
    found = run(model, positions)
    first = model.asked.index((True, False))
    assert model.asked[first:] == ([(True, False), (True,)] * len(positions))[: len(model.asked) - first]
    for position, given in list(zip(positions, found, strict=True))[-4:]:
        torch.testing.assert_close(given, model.exact(position))


def test_a_difference_that_has_become_small_may_point_anywhere():
    class Fading(Model):
        def exact(self, position: float) -> tuple[torch.Tensor, torch.Tensor]:
            wanted = DELTA if position < 4 * STEP else 1e-3 * DELTA.flip(1)
            return wanted, torch.zeros(1, 2)

    model = Fading()
    run(model, even(10))
    assert (True, False) not in model.asked

"""How much the demo does, by a clock that the test sets: never too little to be measured, never by one moment."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from comfyui_agd.examples.toy import demo
from comfyui_agd.examples.toy.demo import MethodSamples, sampling_budget, speedup, training_budget
from comfyui_agd.examples.toy.sampling import BATCH
from comfyui_agd.examples.toy.standard_errors import share_error
from comfyui_agd.examples.toy.step_budget import StepBudget
from comfyui_agd.training.learning_rate import learning_rate

Machine = Callable[[int, float], float]  # the seconds that a step takes, by its number and the time


class Clock:
    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def worked(budget: StepBudget, clock: Clock, machine: Machine) -> tuple[int, list[int]]:
    """The steps that were done, and how many were planned before each."""
    done, planned_before = 0, []
    while done < (planned := budget.steps(done)):
        planned_before.append(planned)
        clock.now += machine(done, clock.now)
        done += 1
    return done, planned_before


def trained(machine: Machine) -> tuple[int, float, list[int]]:
    """The iterations that the demo trains on that machine, when it is done, and how many it planned before each."""
    clock = Clock()
    done, planned = worked(training_budget(0.0, None, clock), clock, machine)
    return done, clock.now, planned


def pictures(machine: Machine, since: float = 280.0) -> int:
    """The pictures of each method that the demo draws after a training of so many seconds."""
    clock = Clock(since)
    return BATCH * worked(sampling_budget(0.0, None, clock), clock, machine)[0]


MACHINES: dict[str, Machine] = {
    "idle": lambda step, now: 0.11,
    "slow": lambda step, now: 0.3,
    "very slow": lambda step, now: 5.0,
    "busy at first": lambda step, now: 20.0 if step < 3 else 0.1,
    "busy for a minute": lambda step, now: 2.0 if 60 < now < 120 else 0.1,
    "busy from then on": lambda step, now: 0.1 if now < 100 else 0.4,
    "stuck near the end": lambda step, now: 300.0 if step == 2000 else 0.11,
    "idle from then on": lambda step, now: 1.0 if now < 150 else 0.1,
}


def test_an_idle_machine_does_all_of_it():
    assert trained(MACHINES["idle"])[0] == demo.ITERATIONS
    assert pictures(lambda round, now: 25.0) == demo.PICTURES


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_training_never_falls_below_its_least_and_uses_its_time(machine):
    done, seconds, _ = trained(machine)
    assert demo.LEAST_ITERATIONS <= done <= demo.ITERATIONS
    if done < demo.ITERATIONS:
        assert seconds > 0.9 * demo._TRAINED_AFTER
    if machine is not MACHINES["very slow"] and machine is not MACHINES["stuck near the end"]:
        assert seconds < 1.15 * demo._TRAINED_AFTER


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_learning_rate_has_fallen_when_a_training_ends(machine):
    _, _, planned = trained(machine)
    config = demo.training_config(planned[-1], 6.0)
    last = learning_rate(len(planned) - 1, config)
    assert last < 0.03 * config.learning_rate


def test_a_busy_moment_costs_no_more_than_itself():
    assert trained(MACHINES["busy at first"])[0] > 0.85 * demo.ITERATIONS
    assert trained(MACHINES["busy for a minute"])[0] > 0.85 * demo.ITERATIONS
    assert pictures(lambda round, now: 100.0 if round == 0 else 15.0) == demo.PICTURES


def test_the_plan_goes_by_the_last_iterations_and_by_enough_of_them():
    done, _, planned = trained(MACHINES["idle from then on"])
    assert set(planned[:100]) == {demo.ITERATIONS}  # too early for an estimate
    assert demo.LEAST_ITERATIONS <= min(planned) < 0.5 * done
    assert min(planned[400:]) > 0.9 * done  # 250 idle iterations later


def test_a_very_slow_machine_takes_longer_and_does_the_least():
    done, seconds, _ = trained(MACHINES["very slow"])
    assert (done, seconds) == (demo.LEAST_ITERATIONS, 5.0 * demo.LEAST_ITERATIONS)
    assert pictures(lambda round, now: 500.0, since=seconds) == demo.LEAST_PICTURES >= 256


def test_a_slow_machine_draws_as_many_pictures_as_there_is_time_for():
    assert demo.LEAST_PICTURES < pictures(lambda round, now: 38.0) < demo.PICTURES
    assert pictures(lambda round, now: 10.0 if round < 5 else 400.0) < demo.PICTURES


@pytest.mark.parametrize("machine", [MACHINES["idle"], MACHINES["very slow"]])
def test_a_number_that_is_asked_for_is_done_whatever_the_clock_says(machine):
    clock = Clock()
    assert worked(training_budget(0.0, 12, clock), clock, machine)[0] == 12
    assert worked(training_budget(0.0, 5000, clock), clock, machine)[0] == 5000
    assert worked(sampling_budget(0.0, 100, clock), clock, machine)[0] == math.ceil(100 / BATCH)


# What can be measured with so many pictures


def drawn(method: str, count: int, seconds: list[float]) -> MethodSamples:
    rounds = [torch.zeros(count // len(seconds), 3, 2, 2)] * len(seconds)
    return MethodSamples(method, 3.0, None, None, rounds, seconds, evaluations=count * 40)


def cfg_and_agd(count: int, cfg: list[float], agd: list[float]) -> list[MethodSamples]:
    return [drawn("cfg", count, cfg), drawn("agd", count, agd)]


@pytest.mark.parametrize(("count", "scored"), [(256, True), (512, True), (252, False), (16, False)])
def test_pictures_are_scored_only_where_they_are_enough(count, scored):
    scorer = SimpleNamespace(accuracy=lambda images, scenes: 1.0, frechet=lambda images: 4816.0)
    found = drawn("agd", count, [1.0] * 4).measure(scorer, [])
    values = [getattr(found, key) for key in ("prompt_accuracy", "prompt_accuracy_se", "frechet_to_real")]
    assert (None not in values) is scored
    assert scored or set(values) == {None}
    assert found.evaluations_per_step == 2.0


def test_an_accuracy_of_one_is_not_certain():
    assert 0.002 < share_error(1.0, 512) < share_error(1.0, 256) < 0.01
    assert share_error(0.9, 512) == pytest.approx(math.sqrt(0.9 * 0.1 / 512), rel=0.05)


def test_the_speed_up_is_measured_in_rounds_side_by_side():
    busy = [1.0, 4.0, 1.0, 2.0]  # what else the machine does slows both alike
    found, error = speedup(cfg_and_agd(256, [1.8 * s for s in busy], busy))
    assert found == pytest.approx(1.8)
    assert error < 1e-6


@pytest.mark.parametrize(
    ("count", "cfg", "agd"),
    [
        (252, [1.8] * 4, [1.0] * 4),  # too few
        (256, [1.8], [1.0]),  # one round has no error
        (256, [1.8, 9.0, 1.0, 1.8], [1.0, 1.0, 1.0, 6.0]),  # too busy
    ],
)
def test_a_speed_up_that_is_too_uncertain_is_not_reported(count, cfg, agd):
    assert speedup(cfg_and_agd(count, cfg, agd)) == (None, None)

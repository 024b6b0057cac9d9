"""How much the demo does, by a clock that the test turns: never too little to tell something, never by one moment."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from comfyui_agd.examples.toy import demo
from comfyui_agd.examples.toy.demo import Column, sampling_pace, share_error, speedup, training_pace
from comfyui_agd.examples.toy.pace import Pace
from comfyui_agd.examples.toy.sampling import BATCH
from comfyui_agd.training.step import learning_rate

Machine = Callable[[int, float], float]  # the seconds that a step takes, by its number and the time


class Clock:
    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def worked(pace: Pace, clock: Clock, machine: Machine) -> tuple[int, list[int]]:
    """The steps that were done, and how many there were to be, as was thought before each."""
    done, thought = 0, []
    while done < (planned := pace.steps(done)):
        thought.append(planned)
        clock.now += machine(done, clock.now)
        done += 1
    return done, thought


def trained(machine: Machine) -> tuple[int, float, list[int]]:
    """The iterations that the demo trains on that machine, when it is done, and what it thought on the way."""
    clock = Clock()
    done, thought = worked(training_pace(0.0, None, clock), clock, machine)
    return done, clock.now, thought


def pictures(machine: Machine, since: float = 280.0) -> int:
    """The pictures of each method that the demo draws after a training of so many seconds."""
    clock = Clock(since)
    return BATCH * worked(sampling_pace(0.0, None, clock), clock, machine)[0]


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
    _, _, thought = trained(machine)
    config = demo.training_config(thought[-1], 6.0)
    last = learning_rate(len(thought) - 1, config)
    assert last < 0.03 * config.learning_rate


def test_a_busy_moment_costs_no_more_than_itself():
    assert trained(MACHINES["busy at first"])[0] > 0.85 * demo.ITERATIONS
    assert trained(MACHINES["busy for a minute"])[0] > 0.85 * demo.ITERATIONS
    assert pictures(lambda round, now: 100.0 if round == 0 else 15.0) == demo.PICTURES


def test_what_is_thought_goes_by_the_last_iterations_and_by_no_few():
    done, _, thought = trained(MACHINES["idle from then on"])
    assert set(thought[:100]) == {demo.ITERATIONS}  # too early to tell
    assert demo.LEAST_ITERATIONS <= min(thought) < 0.5 * done
    assert min(thought[400:]) > 0.9 * done  # 250 idle iterations later


def test_a_very_slow_machine_takes_longer_and_does_the_least():
    done, seconds, _ = trained(MACHINES["very slow"])
    assert (done, seconds) == (demo.LEAST_ITERATIONS, 5.0 * demo.LEAST_ITERATIONS)
    assert pictures(lambda round, now: 500.0, since=seconds) == demo.LEAST_PICTURES >= 256


def test_a_slow_machine_draws_as_many_pictures_as_fit():
    assert demo.LEAST_PICTURES < pictures(lambda round, now: 38.0) < demo.PICTURES
    assert pictures(lambda round, now: 10.0 if round < 5 else 400.0) < demo.PICTURES


@pytest.mark.parametrize("machine", [MACHINES["idle"], MACHINES["very slow"]])
def test_a_number_that_is_asked_for_is_done_whatever_the_clock_says(machine):
    clock = Clock()
    assert worked(training_pace(0.0, 12, clock), clock, machine)[0] == 12
    assert worked(training_pace(0.0, 5000, clock), clock, machine)[0] == 5000
    assert worked(sampling_pace(0.0, 100, clock), clock, machine)[0] == math.ceil(100 / BATCH)


# What so many pictures can tell


def column(method: str, count: int, seconds: list[float]) -> Column:
    rounds = [torch.zeros(count // len(seconds), 3, 2, 2)] * len(seconds)
    return Column(method, 3.0, None, None, rounds, seconds, evaluations=count * 40)


def columns(count: int, cfg: list[float], agd: list[float]) -> list[Column]:
    return [column("cfg", count, cfg), column("agd", count, agd)]


@pytest.mark.parametrize(("count", "told"), [(256, True), (512, True), (252, False), (16, False)])
def test_pictures_are_judged_only_where_they_are_enough(count, told):
    jury = SimpleNamespace(accuracy=lambda images, scenes: 1.0, frechet=lambda images: 4816.0)
    found = column("agd", count, [1.0] * 4).measure(jury, [])
    judged = [found[key] for key in ("prompt_accuracy", "prompt_accuracy_se", "frechet_to_real")]
    assert (None not in judged) is told
    assert told or set(judged) == {None}
    assert found["evaluations_per_step"] == 2.0


def test_an_accuracy_of_one_is_not_certain():
    assert 0.002 < share_error(1.0, 512) < share_error(1.0, 256) < 0.01
    assert share_error(0.9, 512) == pytest.approx(math.sqrt(0.9 * 0.1 / 512), rel=0.05)


def test_the_speed_up_is_told_from_rounds_side_by_side():
    busy = [1.0, 4.0, 1.0, 2.0]  # what else the machine does slows both alike
    found, error = speedup(columns(256, [1.8 * s for s in busy], busy))
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
def test_a_speed_up_that_cannot_be_told_is_not(count, cfg, agd):
    assert speedup(columns(count, cfg, agd)) == (None, None)

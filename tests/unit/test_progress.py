"""How long it still takes, and when a log gets a line."""

from dataclasses import dataclass, field

import pytest

from comfyui_agd.training.progress import PHASES, Progress, ProgressLines, TimeLeft, duration


@dataclass
class Clock:
    """What time it is, as the test says."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Watch:
    """A run that is watched: what is told is the seconds left."""

    clock: Clock = field(default_factory=Clock)

    def __post_init__(self):
        self.time_left = TimeLeft(self.clock)

    def after(self, seconds: float, phase: str, step: int, total: int) -> float | None:
        self.clock.now += seconds
        return self.time_left(phase, step, total)


def test_the_first_step_of_a_phase_says_nothing_of_the_others():
    """Weights are loaded in it, kernels chosen."""
    run = Watch()
    assert run.after(0, "train", 0, 10) is None
    assert run.after(60, "train", 1, 10) is None
    assert run.after(2, "train", 2, 10) == pytest.approx(8 * 2)
    assert run.after(4, "train", 3, 10) == pytest.approx(7 * 3)


def test_a_few_short_steps_say_nothing_yet():
    run = Watch()
    run.after(0, "encode", 0, 1000)
    early = [run.after(0.1, "encode", step, 1000) for step in range(1, 10)]
    assert early == [None] * 9
    assert run.after(0.5, "encode", 10, 1000) == pytest.approx(990 * 1.3 / 9)


def test_a_run_that_goes_on_is_judged_by_what_it_does_now():
    run = Watch()
    run.after(0, "train", 500, 1000)
    run.after(9, "train", 501, 1000)
    assert run.after(2, "train", 502, 1000) == pytest.approx(498 * 2)


def test_phases_in_between_take_none_of_the_time_of_those_around_them():
    run = Watch()
    run.after(0, "train", 0, 10)
    for step in range(1, 6):
        run.after(0, "rollout", 0, 4)
        run.after(50, "rollout", 2, 4)
        run.after(50, "rollout", 4, 4)
        left = run.after(2, "train", step, 10)
    assert left == pytest.approx(5 * 2)


def test_a_phase_that_comes_again_is_as_fast_as_before():
    run = Watch()
    run.after(0, "measure", 0, 3)
    run.after(30, "measure", 1, 3)
    run.after(5, "measure", 2, 3)
    assert run.after(5, "measure", 3, 3) == 0
    assert run.time_left.of_whole("measure") == pytest.approx(3 * 5)
    assert run.after(1000, "measure", 0, 6) == pytest.approx(6 * 5)
    assert run.time_left.of_whole("preview") == 0


def test_a_phase_that_begins_anew_or_changes_its_size_is_told_as_it_is():
    """Where memory ran out in the middle of it, or a run goes by the clock."""
    run = Watch()
    run.after(0, "teacher", 0, 10)
    run.after(1, "teacher", 4, 10)
    run.after(8, "teacher", 8, 10)
    assert run.after(3, "teacher", 0, 10) == pytest.approx(10 * 2)
    assert run.after(6, "teacher", 2, 5) == pytest.approx(3 * (8 + 6) / 6)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_a_duration_is_short(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_comes_first_of_what_is_known():
    progress = Progress("train", 12, 40, 0.1234, 0.62, 12_300_000_000, 150.0)
    assert progress.describe() == "Training: 12/40, 2 min left, gap closed 62%, loss 0.1234, memory 12.3 GB"
    assert Progress("encode", 0, 40).describe() == "Encoding prompts: 0/40"


def lines_of(reports: list[tuple[float, Progress]]) -> list[str]:
    """What is written of a run with so many seconds before each report."""
    clock, written = Clock(), []
    lines = ProgressLines(written.append, clock)
    for seconds, progress in reports:
        clock.now += seconds
        lines(progress)
    return written


def test_a_log_has_a_line_where_a_phase_begins_and_two_a_minute():
    reports = [(1, Progress("encode", step, 100)) for step in range(101)]
    assert lines_of(reports) == [f"Encoding prompts: {step}/100" for step in (0, 30, 60, 90)]


def test_phases_that_take_turns_do_not_flood_a_log():
    turns = [(0.5, Progress(phase, 1, 2)) for _ in range(1000) for phase in PHASES]
    seconds = 0.5 * len(turns)
    assert len(lines_of(turns)) <= len(PHASES) + seconds / 30

"""How far a run is: what is reported, how long it still takes, and a line about it now and then."""

import time
from collections.abc import Callable
from dataclasses import dataclass

PHASES = {
    "plan": "Counting what a step takes",
    "encode": "Encoding prompts",
    "rollout": "Sampling with guidance, to learn from",
    "train": "Training",
    "teacher": "Sampling with guidance, to measure at",
    "measure": "Measuring the adapter",
    "preview": "Drawing a preview",
    "record": "Recording",
    "sample": "Sampling by each method",
}
_SECONDS_TO_JUDGE = 1.0  # less than this tells little of how long the rest takes
_SECONDS_BETWEEN_LINES = 30.0


def duration(seconds: float) -> str:
    """In a unit that keeps it short."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `phase`: one of `PHASES`; "train" after each iteration, the others in between. Steps of a
    phase take about equally long: evaluations, where they differ.

    `loss` is the mean of the last 50 iterations', `gap_closed` the last measured, its mean over omega; `memory` in
    bytes, the most so far; `seconds_left` of the phase, None where that is unknown.
    """

    phase: str
    step: int
    total: int
    loss: float | None = None
    gap_closed: float | None = None
    memory: int | None = None
    seconds_left: float | None = None

    def describe(self) -> str:
        """What matters most comes first: ComfyUI's classic canvas shows about 60 characters."""
        return ", ".join([f"{PHASES[self.phase]}: {self.step}/{self.total}", *self.details()])

    def details(self) -> list[str]:
        """All that is known beside the step."""
        details = []
        if self.seconds_left is not None:
            details.append(f"{duration(self.seconds_left)} left")
        if self.gap_closed is not None:
            details.append(f"gap closed {self.gap_closed:.0%}")
        if self.loss is not None:
            details.append(f"loss {self.loss:.4f}")
        if self.memory is not None:
            details.append(f"memory {self.memory / 1e9:.1f} GB")
        return details


@dataclass
class _Pace:
    """Of a phase: the step of its last report, its whole number, and how long so many steps took."""

    step: int = 0
    total: int = 0
    steps: int = 0
    seconds: float = 0.0
    is_warm: bool = False


class TimeLeft:
    """How long phases still take, by their pace in this process.

    Phases come in between others, and come again: what passed since the last report, whichever phase's, was time of the
    one that is reported now. The first step of a phase doesn't count: weights are loaded in it, kernels chosen.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._last = clock, clock()
        self._paces: dict[str, _Pace] = {}

    def __call__(self, phase: str, step: int, total: int) -> float | None:
        """Seconds from this report to the end of the phase; None where it is too early to say."""
        now = self._clock()
        passed, self._last = now - self._last, now
        if phase not in self._paces:
            self._paces[phase] = _Pace(step)
        pace = self._paces[phase]
        taken, pace.step, pace.total = step - pace.step, step, total
        if taken > 0 and pace.is_warm:
            pace.steps, pace.seconds = pace.steps + taken, pace.seconds + passed
        pace.is_warm = pace.is_warm or taken > 0
        if step >= total:
            return 0.0
        return (total - step) * pace.seconds / pace.steps if pace.seconds >= _SECONDS_TO_JUDGE else None

    def of_whole(self, phase: str) -> float:
        """Seconds that all of a phase takes, by what is known of it."""
        pace = self._paces.get(phase, _Pace())
        return pace.total * pace.seconds / max(1, pace.steps)


class ProgressLines:
    """For logs: a line where a phase first begins, and one every half a minute."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._write, self._clock = write, clock
        self._begun: set[str] = set()
        self._last = clock()

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if progress.phase not in self._begun or now - self._last >= _SECONDS_BETWEEN_LINES:
            self._begun.add(progress.phase)
            self._last = now
            self._write(progress.describe())

"""How many steps of a long computation there is time for, by the clock while it runs."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class StepBudget:
    """As many steps as can be done until the moment `until`, from `least` to `most`; `least` even if that takes longer.

    `steps` is asked after every step, and goes by how long the `recent` last ones took: a busy moment costs no more
    than its own length. `decay_share`: the share of the steps done that still follows where their number has to fall,
    for what ends slowly, as training does while its learning rate decays.
    """

    least: int
    most: int
    until: float
    recent: int = 1
    decay_share: float = 0.0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        self.planned = self.most
        self.moments: deque[tuple[int, float]] = deque(maxlen=self.recent + 1)

    def steps(self, done: int) -> int:
        """How many steps there are in all, as it is expected after `done` of them."""
        now = self.clock()
        self.moments.append((done, now))
        first, then = self.moments[0]
        if done - first < self.recent:
            return self.planned  # too early for an estimate
        per_step = max(now - then, 1e-9) / (done - first)
        possible = done + math.floor(max(0.0, self.until - now) / per_step)
        lowest = max(self.least, min(self.planned, math.ceil((1 + self.decay_share) * done)))
        self.planned = min(self.most, max(lowest, possible))
        return self.planned

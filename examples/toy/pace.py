"""How much of a long work fits into its time, told by the clock while it runs."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Pace:
    """As many steps as fit until the moment `until`, from `least` to `most`; `least` even where that takes longer.

    `steps` is asked after every step, and goes by how long the `recent` last ones took: a busy moment costs no more
    than its own length. `landing`: the share of the steps done that still follows where their number has to fall, for a
    work that ends slowly, as training does.
    """

    least: int
    most: int
    until: float
    recent: int = 1
    landing: float = 0.0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        self.planned = self.most
        self.moments: deque[tuple[int, float]] = deque(maxlen=self.recent + 1)

    def steps(self, done: int) -> int:
        """How many steps there are in all, as it looks after `done` of them."""
        now = self.clock()
        self.moments.append((done, now))
        first, then = self.moments[0]
        if done - first < self.recent:
            return self.planned  # too early to tell
        per_step = max(now - then, 1e-9) / (done - first)
        fitting = done + math.floor(max(0.0, self.until - now) / per_step)
        lowest = max(self.least, min(self.planned, math.ceil((1 + self.landing) * done)))
        self.planned = min(self.most, max(lowest, fitting))
        return self.planned

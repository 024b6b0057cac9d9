"""What guidance needs of a sampling, whichever way it is given: the part that it is for, a step's cfg, what is said."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)


def say_in_log(message: str) -> None:
    log.warning("AGD: %s", message)


def once(notify: Callable[[str], None]) -> Callable[[str], None]:
    """`notify`, for messages that it has not heard yet."""
    said = set()

    def say(message: str) -> None:
        if message not in said:
            said.add(message)
            notify(message)

    return say


@dataclass(frozen=True)
class Span:
    """A part of the noise levels. The end is not part of it, so that of two that meet there one takes the step."""

    sigma_start: float
    sigma_end: float

    @classmethod
    def between(cls, model_sampling, start_percent: float, end_percent: float) -> "Span":
        """From 0, pure noise, to 1, in ComfyUI's percent of a model's schedule."""
        return cls(
            math.inf if start_percent <= 0 else float(model_sampling.percent_to_sigma(start_percent)),
            0.0 if end_percent >= 1 else float(model_sampling.percent_to_sigma(end_percent)),
        )

    @property
    def everywhere(self) -> bool:
        """Whether it is all of a sampling."""
        return self.sigma_start == math.inf and self.sigma_end == 0.0

    def covers(self, timestep: torch.Tensor) -> bool:
        if self.everywhere:
            return True  # the usual case, without reading a value back from the device
        return self.sigma_end < float(timestep.flatten()[0]) <= self.sigma_start


@contextmanager
def with_cfg(guider, cfg: float) -> Iterator[None]:
    saved, guider.cfg = guider.cfg, cfg
    try:
        yield
    finally:
        guider.cfg = saved

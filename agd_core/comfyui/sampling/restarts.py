"""Starting a sampling again in another way, when it turns out on the way that it can't go on as it was begun."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class SamplingMode:
    """The way in which a sampling with adapters is run.

    `unguided_because`: why adapters do nothing in it, in a few words for the user, or None. `mergeable_omega`: the
    omega for which the only adapter's low-rank changes can be in the base's weights; `merged_omega`: for which they
    are. `evaluates_all`: whether no step may be forecast.
    """

    unguided_because: str | None = None
    mergeable_omega: float | None = None
    merged_omega: float | None = None
    evaluates_all: bool = False


class RestartSampling(BaseException):
    """A sampling has to start again; its OUTER_SAMPLE wrapper decides in which way.

    No `Exception`, for other nodes catch those around an evaluation and would go on with what it left.
    """


class RestartUnguided(RestartSampling):
    """A sampling can't be guided by adapters, for a `reason` in a few words."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class RestartMerged(RestartSampling):
    """A guided step was asked for, and the adapter's low-rank changes can be in the weights."""


class RestartWithoutForecasts(RestartSampling):
    """Every step has to be evaluated, for another node compares with its predictions or leaves evaluations out."""


@dataclass
class PendingRestart:
    """Raises a restart, and raises it again should another node have caught it.

    It keeps what makes the exception. The exception itself would keep the frames that it passed, and the model, alive.
    """

    make: Callable[[], RestartSampling] | None = None

    def request(self, make: Callable[[], RestartSampling]) -> NoReturn:
        self.make = make
        raise make()

    def raise_if_requested(self) -> None:
        if self.make is not None:
            raise self.make()

"""Starting a sampling again in another way, when it turns out on the way that it can't go on as it was begun."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch


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


@dataclass(frozen=True)
class RandomState:
    """PyTorch's own random numbers on the CPU and on a model's device, of which some samplers make their noise, as they
    are when a sampling begins: one that starts again makes the same.

    `on_device`: None where the device has none of its own.
    """

    device: torch.device
    on_cpu: torch.Tensor
    on_device: torch.Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        generators = _generators_of(device)
        return cls(device, torch.get_rng_state(), None if generators is None else generators.get_rng_state(device))

    def restore(self) -> None:
        torch.set_rng_state(self.on_cpu)
        if self.on_device is not None:
            _generators_of(self.device).set_rng_state(self.on_device, self.device)


def _generators_of(device: torch.device) -> Any:
    """PyTorch's module with the generators of a device; None for the CPU, and for devices that it has none for."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None


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

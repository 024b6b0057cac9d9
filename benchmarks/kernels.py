"""Kernels that a step of sampling launches on a GPU, and the time that they run, by torch.profiler.

On a CPU, which launches none, operators that call no others stand in for them, so that the counting can be tried.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

# What a model calls of an adapter.
ADAPTER_CALLS = ("prepare", "add_after_attention", "add_inside_attention", "add_at_linear")
_MARK = "agd adapter"


class Kernels(NamedTuple):
    """So many of them, and the seconds that they run for together."""

    count: int
    seconds: float

    def __sub__(self, other: "Kernels") -> "Kernels":
        return Kernels(self.count - other.count, self.seconds - other.seconds)


@contextmanager
def marked(adapter: torch.nn.Module | None) -> Iterator[None]:
    """Inside, a profiler's events have a range around each call of the adapter."""
    with ExitStack() as undo:
        for name in ADAPTER_CALLS if adapter is not None else ():
            setattr(adapter, name, _in_range(getattr(adapter, name)))
            undo.callback(delattr, adapter, name)
        yield


def _in_range(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        with record_function(_MARK):
            return function(*args, **kwargs)

    return call


def kernels_of(run: Callable[[], object], device: torch.device, adapter: torch.nn.Module | None) -> dict[str, Kernels]:
    """Those of `run`: in "all", and "inside" the adapter."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with marked(adapter), profile(activities=activities) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profiler.events()
    roots = [event for event in events if event.device_type == DeviceType.CPU and event.cpu_parent is None]
    launched = [each for root in roots for each in _launched(root, False, device)]
    inside = [seconds for is_inside, seconds in launched if is_inside]
    if device.type == "cuda":  # of compiled code not every kernel has the operator that launched it
        every = [event.time_range.elapsed_us() / 1e6 for event in events if _is_kernel(event)]
    else:
        every = [seconds for _, seconds in launched]
    return {"all": Kernels(len(every), sum(every)), "inside": Kernels(len(inside), sum(inside))}


def _is_kernel(event) -> bool:
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation and event.name != _MARK


def _launched(event, inside: bool, device: torch.device) -> Iterator[tuple[bool, float]]:
    """Of an operator and those that it calls: whether inside the adapter, and the seconds."""
    inside = inside or event.name == _MARK
    if device.type == "cuda":
        # A range shows on the device too.
        yield from ((inside, kernel.duration / 1e6) for kernel in event.kernels if kernel.name != _MARK)
    elif not event.cpu_children and event.name != _MARK:
        yield inside, event.self_cpu_time_total / 1e6
    for child in event.cpu_children:
        yield from _launched(child, inside, device)


def kernels_per_step(
    sample: Callable[[int], object], device: torch.device, adapter: torch.nn.Module | None = None
) -> dict:
    """Of a step that is not a sampling's first. `sample` takes so many steps."""
    one, two = (kernels_of(functools.partial(sample, steps), device, adapter) for steps in (1, 2))
    found = {name: two[name] - one[name] for name in two}
    row = {"kernels_per_step": found["all"].count, "kernel_seconds_per_step": found["all"].seconds}
    if adapter is None:
        return row
    return row | {"kernels_inside": found["inside"].count, "kernel_seconds_inside": found["inside"].seconds}

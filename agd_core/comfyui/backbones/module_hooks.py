"""Hooks on modules for the time of an evaluation, all under one name: torch.compile finds them where it found them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..guided_step import KEY


@contextmanager
def hooked_before(module: nn.Module, hook: Callable[[nn.Module, tuple, dict], tuple[tuple, dict]]) -> Iterator[None]:
    """Inside, `hook` gives `module` its arguments, after the hooks that are there."""
    with _entry(module._forward_pre_hooks, hook), _entry(module._forward_pre_hooks_with_kwargs, True):
        yield


@contextmanager
def hooked_behind(module: nn.Module, hook: Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, `hook` gives what `module` returns, after the hooks that are there."""
    with _entry(module._forward_hooks, hook):
        yield


@contextmanager
def _entry(hooks: dict[Any, Any], value: Any) -> Iterator[None]:
    before = hooks.get(KEY)  # of an evaluation that this one is inside of
    hooks[KEY] = value
    try:
        yield
    finally:
        if before is None:
            del hooks[KEY]
        else:
            hooks[KEY] = before

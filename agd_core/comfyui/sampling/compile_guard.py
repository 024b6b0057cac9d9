"""Models that torch.compile has compiled: whether they are, running them as they are, and noticing broken graphs.

Inside a broken graph the guards on a block's name and on its patches are dropped: code compiled for one block runs for
others, and code compiled with adapters for the model without them. Whole graphs are right.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from comfy.patcher_extension import WrappersMP

from .messages import UNCOMPILED_FOR_GRAPH_BREAKS

_COMPILE = "torch.compile"  # ComfyUI's key of what its compile nodes register


class NotCompiled(Exception):
    """torch.compile did not make one graph of the model with its adapters. Its text is for the user."""


def is_compiled(transformer_options: dict) -> bool:
    return bool(transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(_COMPILE))


def without_compile(transformer_options: dict) -> dict:
    """A copy of `transformer_options` with which the model runs as it is."""
    wrappers = transformer_options["wrappers"]
    kept = {key: value for key, value in wrappers[WrappersMP.APPLY_MODEL].items() if key != _COMPILE}
    return {**transformer_options, "wrappers": {**wrappers, WrappersMP.APPLY_MODEL: kept}}


def _graph_breaks() -> int:
    from torch._dynamo.utils import counters  # slow to import, but loaded where anything is compiled

    return sum(counters["graph_break"].values())


@contextmanager
def in_one_graph(transformer_options: dict, all_layers_visited: Callable[[], bool]) -> Iterator[None]:
    """Inside, a compiled model is evaluated once. Raises `NotCompiled` where that was not all one graph."""
    if not is_compiled(transformer_options):
        yield
        return
    before = _graph_breaks()
    yield
    if not all_layers_visited() or _graph_breaks() > before:
        # What has just been compiled would run for the model without adapters, too.
        torch.compiler.reset()
        raise NotCompiled(UNCOMPILED_FOR_GRAPH_BREAKS)

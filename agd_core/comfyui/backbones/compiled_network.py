"""A network and what adapters do in it, as torch.compile makes one graph of both.

ComfyUI's compile node has the network compiled as it is, and hooks on its modules come and go unseen by the compiler.
So the network with hooks is compiled apart from it, by a function that is told which there are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..sampling import messages
from ..sampling.compile_guard import NotCompiled
from .block_attention import OverrideFor, with_override, without_override

_compiled: dict[str, Callable] = {}  # by torch.compile's options; what it has compiled stays while the process lives


def _evaluate(forward: Callable, hooks: str, override: OverrideFor | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    assert hooks  # what a function reads the compiler checks when it is called again
    if override is not None:
        kwargs = with_override(kwargs, override)
    return forward(*args, **kwargs)


@contextmanager
def compiled(network: nn.Module, hooks: str, options: dict[str, Any]) -> Iterator[None]:
    """Inside, the network is compiled, with torch.compile's `options`, with the hooks that it has when it is called.

    `hooks` names them, so that others are another graph. Raises `NotCompiled` where it can't be one graph.
    """
    run = _compiled.setdefault(repr(options), torch.compile(_evaluate, **{**options, "fullgraph": True}))
    before, forward = vars(network).get("forward"), network.forward

    def run_compiled(*args, **kwargs):
        from torch._dynamo import exc  # slow to import, but loaded where anything is compiled

        given, override = without_override(kwargs)
        try:
            return run(forward, hooks, override, args, given)
        except exc.Unsupported as error:
            raise NotCompiled(messages.UNCOMPILED_FOR_GRAPH_BREAKS) from error
        except getattr(exc, "FailOnRecompileLimitHit", ()) as error:  # older releases call it unsupported
            raise NotCompiled(messages.UNCOMPILED_FOR_TOO_MANY_GRAPHS) from error

    network.forward = run_compiled
    try:
        yield
    finally:
        del network.forward
        if before is not None:
            network.forward = before

"""Attentions that ask no `optimized_attention_override`, so that they ask one.

Some of ComfyUI's networks (PixArt, Hunyuan-DiT, ERNIE-Image) run the attention function without `transformer_options`,
which is where it finds an override. While one is wanted, such a module's forward is a copy of its own in which the
function's name means the same function with an override. Nothing is changed but that attribute of that module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType

from torch import nn

# The attention function's name in the files of ComfyUI's networks.
_FUNCTION = "optimized_attention"


class HookedForward:
    """`module.forward`, with transformer_options for its attentions: `options()`, new ones for each run."""

    def __init__(self, module: nn.Module, options: Callable[[], dict]):
        self.module, self.options = module, options

    def __call__(self, *args, **kwargs):
        forward = type(self.module).forward
        names = forward.__globals__
        attention = partial(names[_FUNCTION], transformer_options=self.options())
        own = FunctionType(
            forward.__code__,
            {**names, _FUNCTION: attention},
            argdefs=forward.__defaults__,
            closure=forward.__closure__,
        )
        return own(self.module, *args, **kwargs)


def can_hook(module: nn.Module) -> bool:
    """Whether the module's forward runs the attention function, and is its own: no other node has replaced it."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and _FUNCTION in code.co_names and "forward" not in vars(module)


def hooked_in(block: nn.Module) -> list[HookedForward]:
    """Those that modules inside `block` have at the moment."""
    forwards = [vars(module).get("forward") for module in block.modules()]
    return [forward for forward in forwards if isinstance(forward, HookedForward)]


@contextmanager
def hooked(forwards: list[HookedForward]) -> Iterator[None]:
    """Inside, their modules run those."""
    for forward in forwards:
        forward.module.forward = forward
    try:
        yield
    finally:
        for forward in forwards:
            del forward.module.forward

"""Which blocks of a network run in an evaluation: what a step cache of another node leaves out shows by them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from .sampling.compile_guard import is_compiled


def listed_blocks(network: nn.Module, transformer_options: dict) -> list[nn.Module]:
    """The members of its lists of modules. None of a compiled model's, of which no block is called."""
    if is_compiled(transformer_options):
        return []
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    return [block for own in lists for block in own]


@contextmanager
def watched(blocks: list[nn.Module], on_run: Callable[[nn.Module], None]) -> Iterator[None]:
    """Inside, `on_run` is called with each of `blocks` that is about to run."""

    def hook(block: nn.Module, inputs: tuple) -> None:
        on_run(block)

    handles = [block.register_forward_pre_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

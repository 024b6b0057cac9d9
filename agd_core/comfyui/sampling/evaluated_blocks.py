"""Which blocks of a model an evaluation runs, by which a step cache of another node shows: it leaves some out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from ..sampling.compile_guard import is_compiled


@dataclass
class EvaluatedBlocks:
    """`ran`: the blocks of the evaluation so far, by their id; `most`: as many as the last evaluation ran."""

    ran: set[int] = field(default_factory=set)
    most: int = 0

    def begin(self) -> None:
        """Called before an evaluation."""
        self.ran.clear()

    def were_left_out(self) -> bool:
        """Whether an evaluation has run fewer than the one before."""
        if len(self.ran) < self.most:
            return True
        self.most = len(self.ran)
        return False


@contextmanager
def recorded_blocks(model: nn.Module, blocks: EvaluatedBlocks, model_options: dict) -> Iterator[None]:
    """Inside, `blocks` records what the model evaluates. Nothing of a compiled model, of which no block is called."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    compiled = is_compiled(model_options["transformer_options"])
    hooked = [] if compiled else [block for own in lists for block in own]
    ran = blocks.ran

    def record(block: nn.Module, inputs) -> None:
        ran.add(id(block))

    hooks = [block.register_forward_pre_hook(record) for block in hooked]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

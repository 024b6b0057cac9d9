"""Which blocks of a model an evaluation runs, by which a step cache of another node shows: it leaves some out."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import nn

from ..running_blocks import listed_blocks, watched


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


def recorded_blocks(model: nn.Module, blocks: EvaluatedBlocks, model_options: dict) -> AbstractContextManager[None]:
    """Inside, `blocks` records what the model evaluates."""
    return watched(listed_blocks(model, model_options["transformer_options"]), lambda block: blocks.ran.add(id(block)))

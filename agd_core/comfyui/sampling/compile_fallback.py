"""Whether a compiled model runs compiled with its adapters."""

from dataclasses import dataclass

import torch

from ..backbones import backbone_of
from ..guided_step import GuidedStep
from ..sampling.compile_guard import GraphBreak, is_compiled, without_compile
from . import messages
from .cond_batch import CondBatch
from .messages import Notify


@dataclass
class CompileFallback:
    """Evaluates a MODEL's steps compiled where torch.compile makes one graph of them, otherwise as the model is.

    `usable`: whether it has made one so far.
    """

    notify: Notify
    usable: bool = True

    def evaluate(self, batch: CondBatch, step: GuidedStep) -> list[torch.Tensor]:
        options = batch.model_options["transformer_options"]
        unseen = is_compiled(options) and not backbone_of(batch.model).runs_compiled(step)
        if unseen:
            self.notify(messages.UNCOMPILED_FOR_HOOKS)
        if self.usable and not unseen:
            try:
                return batch.evaluate()
            except GraphBreak:
                self.usable = False
                # What has just been compiled would run for the model without adapters, too.
                torch.compiler.reset()
                self.notify(messages.UNCOMPILED_FOR_GRAPH_BREAKS)
        if is_compiled(options):
            batch = batch.with_transformer_options(without_compile(options))
        return batch.evaluate()

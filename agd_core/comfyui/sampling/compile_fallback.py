"""How a compiled model runs with its adapters."""

from dataclasses import dataclass

import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ..backbones import backbone_of
from ..guided_step import GuidedStep
from ..sampling.compile_guard import NotCompiled, is_compiled, without_compile
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
        if not is_compiled(options):
            return batch.evaluate()
        backbone, as_it_is = backbone_of(batch.model), batch.with_transformer_options(without_compile(options))
        unseen, compile_options = not backbone.runs_compiled(step), batch.model_options.get(TORCH_COMPILE_KWARGS)
        if unseen and not (compile_options and backbone.compiles):
            self.notify(messages.UNCOMPILED_FOR_HOOKS)
        elif self.usable:
            try:
                if not unseen:
                    return batch.evaluate()
                step.compile_options = compile_options
                return as_it_is.evaluate()
            except NotCompiled as error:
                self.usable, step.compile_options = False, None
                self.notify(str(error))
        return as_it_is.evaluate()

"""Networks that are one or several lists of blocks: the diffusion transformers, found by their family's row.

Adapters change their blocks' linear layers, merged into the weights or through hooks on the modules, which every such
network runs whatever else it calls. Kinds that work at the attention have no place there yet.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...config import AdapterLayer, Linear
from ...families import Family
from ..guided_step import GuidedStep
from .backbone import Backbone
from .linears import adapted_linears


class Transformer(Backbone):
    """The lists, and where the prompt comes in, are in the family's row; the blocks' linear layers are seen."""

    layout = "transformer"
    kinds = ("low_rank",)

    @classmethod
    def fits(cls, network: nn.Module, family: Family) -> bool:
        try:
            for path in (*family.blocks, family.prompt_layer):
                network.get_submodule(path)
        except AttributeError:
            return False
        return bool(family.blocks)

    def layers(self) -> tuple[AdapterLayer, ...]:
        assert self.family is not None
        prompt_layer: Any = self.network.get_submodule(self.family.prompt_layer)
        context_dim, found = prompt_layer.in_features, []
        for name in self.family.blocks:
            for index, block in enumerate(self.network.get_submodule(name).children()):
                linears = tuple(self._linears(block))
                width = linears[0].inputs
                found.append(AdapterLayer(f"{name}_{index}", f"{name}.{index}", width, context_dim, linears=linears))
        return tuple(found)

    def _linears(self, block: nn.Module) -> Iterator[Linear]:
        assert self.family is not None
        for path, module in block.named_modules():
            if hasattr(module, "in_features") and hasattr(module, "out_features"):
                yield Linear(path, module.in_features, module.out_features, path in self.family.prompt_linears)

    @contextmanager
    def intercept(self, step: GuidedStep) -> Iterator[dict[str, Any]]:
        with ExitStack() as of_linears:

            def prepare(network: nn.Module, args: tuple, kwargs: dict) -> None:
                """Before the network's forward(x, timesteps, context=...), as ComfyUI calls all of them."""
                x, timesteps = args[:2]
                step.visited[:] = step.layer_names()
                of_linears.close()  # of the evaluation before, where a model takes several
                if step.changes_linears:
                    prepared = step.prepare(self.timesteps(timesteps), kwargs.get("context"), x.dtype)
                    of_linears.enter_context(adapted_linears(self, prepared))

            handle = self.network.register_forward_pre_hook(prepare, with_kwargs=True)
            try:
                yield {}
            finally:
                handle.remove()

    def timesteps(self, t: torch.Tensor) -> torch.Tensor:
        assert self.family is not None
        return t * self.family.timestep_scale

    def time_embedding(self) -> nn.Module:
        assert self.family is not None
        return self.network.get_submodule(self.family.time_embedding)

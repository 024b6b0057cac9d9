"""Low-rank changes of a base's linear layers while they are evaluated: forward hooks, there for one evaluation only."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ...adapter import Adapter, Prepared
from ...config import AdapterConfig, AdapterLayer
from .backbone import Backbone, UnsupportedModel
from .module_hooks import hooked_behind


def linear_modules(block: nn.Module, layer: AdapterLayer) -> dict[str, nn.Module]:
    """The linear layers of an adapter layer's block, by their path in it.

    Raises `UnsupportedModel` where one is built otherwise than the adapter layer says.
    """
    found = {}
    for linear in layer.linears:
        try:
            module = block.get_submodule(linear.path)
        except AttributeError:
            module = None
        sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if module is None or sizes != (linear.inputs, linear.outputs):
            shown = "nothing" if module is None else f"a {type(module).__name__} from {sizes[0]} to {sizes[1]} channels"
            raise UnsupportedModel(
                "This model's layers are built otherwise than an adapter with a rank needs: train one of kind delta "
                f"with rank 0. Details: such an adapter needs {linear.path} in block {layer.name} to be a linear layer "
                f"from {linear.inputs} to {linear.outputs} channels, but this model has {shown} there."
            )
        found[linear.path] = module
    return found


def check_adapter(backbone: Backbone, config: AdapterConfig) -> None:
    """Raises `UnsupportedModel` where the networks have no place for an adapter's kind, or for its low-rank changes."""
    backbone.check_kind(config)
    own = {layer.name: layer for layer in backbone.layers()}
    for layer in config.layers if config.changes_linears else ():
        linear_modules(backbone.block(own[layer.name]), layer)


@dataclass(frozen=True)
class LinearHook:
    """A forward hook: what adapters add to the linear layer `path` of the adapter layer `name`."""

    name: str
    path: str
    adapters: list[tuple[Adapter, Prepared]]

    def __call__(self, module: nn.Module, inputs: tuple, out: torch.Tensor) -> torch.Tensor:
        for adapter, shared in self.adapters:
            out = adapter.add_at_linear(self.name, self.path, out, inputs[0], shared)
        return out


@contextmanager
def adapted_linears(backbone: Backbone, prepared: list[tuple[Adapter, Prepared]]) -> Iterator[None]:
    """Inside, adapters of low rank add to what the linear layers of the backbone's blocks return."""
    hooks: dict[nn.Module, LinearHook] = {}
    for adapter, shared in prepared:
        for layer in adapter.config.layers if adapter.config.changes_linears else ():
            modules = linear_modules(backbone.block(layer), layer)
            for linear in adapter.kind.linears(layer):
                hook = hooks.setdefault(modules[linear.path], LinearHook(layer.name, linear.path, []))
                hook.adapters.append((adapter, shared))
    with ExitStack() as hooked:
        for module, hook in hooks.items():
            hooked.enter_context(hooked_behind(module, hook))
        yield

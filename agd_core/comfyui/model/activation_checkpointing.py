"""Activation checkpointing of a base (Chen et al. 2016, arXiv 1604.06174): less memory for a training step, at the
price of a second forward pass."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import comfy.ops
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..backbones import Backbone
from ..backbones.linears import LinearHook
from ..backbones.module_hooks import hooked_behind
from ..backbones.unhooked_attention import HookedForward, hooked, hooked_in


def _adapter_hooks(block: nn.Module) -> list[tuple[nn.Module, Callable]]:
    """The forward hooks by which adapters change layers inside `block` in the evaluation that goes on."""
    layers = [module for module in block.modules() if module is not block]
    return [(layer, hook) for layer in layers for hook in layer._forward_hooks.values() if isinstance(hook, LinearHook)]


@contextmanager
def _hooked(hooks: list[tuple[nn.Module, Callable]], attentions: list[HookedForward]) -> Iterator[None]:
    """Inside, those hooks are on their layers again: the evaluation that had them is over by then."""
    with ExitStack() as again:
        for layer, hook in hooks:
            again.enter_context(hooked_behind(layer, hook))
        again.enter_context(hooked(attentions))
        yield


def _checkpointed(module: nn.Module, keep: Callable[[dict], dict], when: Callable[..., bool] | None = None) -> Callable:
    """`module.forward`, of which autograd keeps only what it was given, and computes it again in the backward pass.

    `keep`: of keyword arguments, as they stay until then; `when`: for which arguments, by default for all.
    """
    forward = module.forward

    def run(*args, **kwargs):
        if not torch.is_grad_enabled() or (when is not None and not when(*args)):
            return forward(*args, **kwargs)
        first, later = iter([kwargs]), keep(kwargs)
        hooks, attentions = _adapter_hooks(module), hooked_in(module)

        def compute(*args):
            now = next(first, None)
            if now is not None:
                return forward(*args, **now)
            with _hooked(hooks, attentions):
                return forward(*args, **keep(later))

        # Nothing in a frozen base is random, so there is no generator's state to preserve.
        return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def _layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, comfy.ops.CastWeightBiasOp)]


def _borrows_weights(layer: nn.Module, x: torch.Tensor) -> bool:
    return layer.weight is not None and layer.weight.device != x.device


def largest_block_bytes(backbone: Backbone) -> int:
    """The weights of the largest checkpointed block: of what is cast at each call, these are there at once."""
    return max(sum(parameter.nbytes for parameter in block.parameters()) for block in backbone.checkpointed_blocks())


@contextmanager
def checkpointed(backbone: Backbone) -> Iterator[None]:
    """Inside, every block of `backbone.checkpointed_blocks` that computes with gradients is checkpointed.

    Outputs and gradients stay the same to the bit. Autograd keeps what a block was given instead of all that it made.
    Besides activations that is the weights that `comfy.ops` casts at each call, of fp8 bases and of layers with a LoRA
    or in system memory: kept until the backward pass, they would add up to a whole base in the compute dtype.

    A layer in system memory is checkpointed by itself, too. ComfyUI brings its weights into a buffer that the next
    layers use again, so that those which autograd kept would be another layer's when the backward pass comes to them.
    """
    blocks, layers = backbone.checkpointed_blocks(), _layers(backbone.network)
    modules = blocks + layers
    before = [vars(module).get("forward") for module in modules]
    try:
        for block in blocks:
            block.forward = _checkpointed(block, backbone.block_arguments)
        for layer in layers:
            layer.forward = _checkpointed(layer, dict, partial(_borrows_weights, layer))
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward

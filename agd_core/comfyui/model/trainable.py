"""A base's blocks as autograd can go back through them.

ComfyUI's networks are made for inference. Transformers rotate queries and keys by kernels without gradients, for which
ComfyUI has others while it trains, but not everywhere; and they overwrite activations that a backward pass needs. In a
block computed with gradients, such a kernel is replaced by the same in plain torch, and what may be overwritten is
copied before it is kept. The results are the same.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..backbones import Backbone

_NORMS = (F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm)


@functools.cache
def _plain_kernels() -> Any:
    """The module with ComfyUI's rotations in plain torch; None in releases that have no other ones."""
    try:
        import comfy_kitchen.backends.eager.rope as rope
    except ImportError:
        return None
    return rope


class _Differentiable(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            library, name, *_ = f"{function}.".split(".")
            plain = getattr(_plain_kernels(), name, None) if library == "comfy_kitchen" else None
            return function(*args, **kwargs) if plain is None else plain(*args, **kwargs)
        if function in _NORMS or (function is F.linear and args[1].requires_grad):
            args = (args[0].clone(), *args[1:])
        return function(*args, **kwargs)


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cloned(each) for each in value)
    return value


def _differentiable(forward: Callable) -> Callable:
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with _Differentiable():
            return forward(*_cloned(args), **{key: _cloned(value) for key, value in kwargs.items()})

    return run


@contextmanager
def trainable(backbone: Backbone) -> Iterator[None]:
    """Inside, the base can be trained through."""
    blocks: list[nn.Module] = backbone.checkpointed_blocks() if backbone.overwrites else []
    before = [vars(block).get("forward") for block in blocks]
    in_training, comfy.model_management.in_training = comfy.model_management.in_training, True
    try:
        for block in blocks:
            block.forward = _differentiable(block.forward)
        yield
    finally:
        comfy.model_management.in_training = in_training
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward

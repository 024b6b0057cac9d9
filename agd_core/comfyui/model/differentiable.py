"""What stands in autograd's way in ComfyUI's networks, which are written for sampling, is done another way.

They run fused operators, of comfy_kitchen, that have no gradients, and change tensors in place that a backward pass, or
a checkpointed block that is computed again, needs as they were.
"""

import importlib
import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import torch

# Of comfy_kitchen: plain code for operators, by their names.
_PLAIN = ("comfy_kitchen.backends.eager.rope", "comfy_kitchen.backends.eager.adaln")
_CHANGES = {
    "__iadd__": operator.add,
    "__isub__": operator.sub,
    "__imul__": operator.mul,
    "__itruediv__": operator.truediv,
}


@contextmanager
def differentiable() -> Iterator[None]:
    """Inside, ComfyUI's networks have gradients: by its own switch for training, and what that leaves (see above).

    Not all of its networks ask the switch, Cosmos-Predict2 and Anima in 0.30 for example. Only what is computed with
    gradients enabled changes: `a += b` is `a = a + b` for tensors, and fused operators are comfy_kitchen's plain code.
    """
    with ExitStack() as inside:
        inside.enter_context(_replaced(comfy.model_management, "in_training", True))
        for name, change in _CHANGES.items():
            in_place = getattr(torch.Tensor, name)
            inside.enter_context(_replaced(torch.Tensor, name, _out_of_place(change, in_place)))
        for name, plain in _plain_operators():
            fused = getattr(torch.ops.comfy_kitchen, name)
            inside.enter_context(_replaced(torch.ops.comfy_kitchen, name, _Operator(plain, fused)))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, the attribute is `value`; afterwards it is as it was, or not there again."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _out_of_place(change: Callable, in_place: Callable) -> Callable:
    def run(a: torch.Tensor, b: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return in_place(a, b)
        return change(a, b).to(a.dtype)  # which a change in place keeps

    return run


class _Operator:
    """In place of the operator `fused`, which it is but for calls with gradients enabled."""

    def __init__(self, plain: Callable, fused: Any):
        self._plain, self._fused = plain, fused

    def __call__(self, *args, **kwargs):
        return (self._plain if torch.is_grad_enabled() else self._fused)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fused, name)


def _plain_operators() -> Iterator[tuple[str, Callable]]:
    for path in _PLAIN:
        try:
            module = importlib.import_module(path)
        except ImportError:  # older releases of ComfyUI run without it
            continue
        for name, function in vars(module).items():
            if not name.startswith("_") and callable(function) and hasattr(torch.ops.comfy_kitchen, name):
                yield name, function

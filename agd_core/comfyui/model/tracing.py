"""What an evaluation costs in memory and arithmetic, counted on fake tensors: nothing is computed or allocated.

The model's own code runs with tensors that have a shape, a dtype and a device but no values, and a dispatch mode
counts the storages that are alive and the FLOPs. Weights may be anywhere, on the meta device too: for the time being
all tensors are fake ones on the CPU, and the result stands for any device that runs fused attention.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ...adapter import Adapter
from ...config import AdapterConfig
from ...mixed_precision import MixedPrecision
from ..backbones import backbone_of
from .activation_checkpointing import checkpointed
from .trainable import trainable


@dataclass(frozen=True)
class Traced:
    """`peak_bytes`: the most that was alive at once above what existed before; `flops`: 2 per multiply-add; `launches`:
    of kernels, one for every operation that does more than look at memory in another way, by its name; `moved_bytes`:
    of all tensors that those read and write, once each."""

    peak_bytes: int
    flops: int
    launches: dict[str, int]
    moved_bytes: int


def _attention(q, k, v, *args, **kwargs) -> int:
    return sdpa_flop_count(q.shape, _shared(k, q), _shared(v, q))


def _attention_backward(grad, q, k, v, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, _shared(k, q), _shared(v, q))


def _shared(keys: torch.Tensor, q: torch.Tensor) -> tuple[int, ...]:
    """The shape of keys or values that several heads may share, as for each head of `q`."""
    return (keys.shape[0], q.shape[1], *keys.shape[2:])


_aten = torch.ops.aten
# torch counts what GPUs run; the last two are the CPU's names for the same.
_FLOPS = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
# Memory is reserved and nothing done with it. (Views say so themselves, but for the first.)
_FREE = (_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty)
# Where they are given a mask, its values say how much there is.
_BY_INDEX = (_aten.index.Tensor, _aten.index_put_.default)


class Counter(TorchDispatchMode):
    """Inside, `peak_bytes` is the most that new storages held at once; `flops`, `launches` and `moved_bytes` are what
    was done, as `Traced` has them.

    What exists already costs nothing, nor do views of it. Works on real tensors as on fake ones.
    """

    def __init__(self):
        super().__init__()
        self.live_bytes = self.peak_bytes = self.flops = self.moved_bytes = 0
        self.launches: dict[str, int] = {}
        self._experts = 1
        self._known: dict[int, weakref.ref] = {}

    def traced(self) -> Traced:
        return Traced(self.peak_bytes, self.flops, dict(self.launches), self.moved_bytes)

    def _know(self, values, cost: bool) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._know(value, cost)
            elif isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._known:
                    self._enter(storage, storage.nbytes() if cost else 0)

    def _enter(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata

        def leave(_):
            self.live_bytes -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, leave)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _share(self, index: torch.Tensor | None) -> torch.Tensor | None:
        """What a mask without values picks: each expert is taken to get an even share of the routed tokens."""
        if index is None or index.dtype != torch.bool:
            return index
        return index.new_empty(max(1, index.numel() // self._experts), dtype=torch.long)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1  # of a tensor without values
        if function is torch.ops.prim.device.default:  # fake tensors ask for it all the time
            return function(*args, **kwargs)
        if function is _aten.topk.default:
            self._experts = args[0].shape[-1]
        elif function in _BY_INDEX and isinstance(args[0], FakeTensor):
            args = (args[0], [self._share(index) for index in args[1]], *args[2:])
        self._know((args, tuple(kwargs.values())), cost=False)
        result = function(*args, **kwargs)
        self._know((result,), cost=True)
        count = _FLOPS.get(function._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        if not (function.is_view or function._overloadpacket in _FREE):
            name = function._overloadpacket.__name__
            self.launches[name] = self.launches.get(name, 0) + 1
            self.moved_bytes += sum(tensor.nbytes for tensor in _tensors((args, kwargs, result)))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    """Those in any nesting, each once."""
    found = {id(each): each for each in tree_leaves(values) if isinstance(each, torch.Tensor)}
    return list(found.values())


def _fake(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    if is_traceable_wrapper_subclass(tensor):  # a quantised weight: values and scales, which its layer unpacks
        names, rest = tensor.__tensor_flatten__()
        parts = {name: _fake(getattr(tensor, name)) for name in names}
        return type(tensor).__tensor_unflatten__(parts, rest, tensor.shape, tensor.stride())
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _frozen(tensor: torch.Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


@contextmanager
def _fake_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters and buffers of `model` are fake; the real ones, untouched, are back afterwards."""
    modules = list(model.modules())
    kept = [(dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in modules]
    try:
        for module, (_, parameters, buffers) in zip(modules, kept, strict=True):
            module._parameters.update({name: _frozen(_fake(value)) for name, value in parameters.items()})
            module._buffers.update({name: _fake(value) for name, value in buffers.items()})
            # Where ComfyUI keeps a layer's place in its dynamic VRAM: with it, a layer on a CPU would copy its weights.
            vars(module).pop("_v", None)
            # Some networks bring a part of theirs to a device: all are on one here, and fake ones can't be moved.
            vars(module)["to"] = partial(_stays, module)
        yield
    finally:
        for module, (attributes, parameters, buffers) in zip(modules, kept, strict=True):
            vars(module).clear()  # some networks keep tensors of their last evaluation
            vars(module).update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _stays(module: nn.Module, *args, **kwargs) -> nn.Module:
    """In place of `module.to`."""
    return module


@contextmanager
def without_values(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Inside, new tensors and those of `model` are fake ones on the CPU."""
    # Some tensors may be real: conditions, a LoRA's weights.
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(False), torch.enable_grad(), fakes, _fake_weights(model):
        yield fakes


def _new_adapter(config: AdapterConfig) -> Adapter:
    adapter = Adapter(config, MixedPrecision)
    for _, parameter in adapter.trained():
        parameter.grad = torch.zeros_like(parameter)
    return adapter


def student(
    model: nn.Module,
    evaluate: Callable[[Adapter, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    config: AdapterConfig,
    shape: tuple[int, ...],
    rows: int,
    *,
    checkpointing: bool = False,
) -> Traced:
    """The forward and backward pass of the student for `rows` latents of `shape` (c, h, w).

    `model` is ComfyUI's BaseModel, and `evaluate(adapter, x, sigma, omega)` -> (rows, c, h, w) evaluates it with
    FUSED_ATTENTION in its transformer_options. The peak comes on top of the weights of the base and of the adapter's
    parameters and gradients, which exist from the second micro batch on.
    """
    with without_values(model):
        adapter, x = _new_adapter(config), torch.ones(rows, *shape)
        sigma, omega = torch.ones(2, rows).unbind()
        backbone = backbone_of(model)
        twice = checkpointed(backbone) if checkpointing else nullcontext()
        with trainable(backbone), twice, Counter() as counter:
            (evaluate(adapter, x, sigma, omega) - x).square().mean().backward()
        return counter.traced()


def base(
    model: nn.Module,
    evaluate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    rows: int,
) -> Traced:
    """As `student`, of `evaluate(x, sigma)` -> (rows, c, h, w) without gradients."""
    with without_values(model), torch.no_grad():
        x, sigma = torch.ones(rows, *shape), torch.ones(rows)
        with Counter() as counter:
            evaluate(x, sigma)
        return counter.traced()

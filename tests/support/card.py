"""A card that this machine doesn't have: what is on `cuda` has a shape, a dtype and a device, but no values.

Tensors on the CPU stay real, so that all the rest of a sampling or a training runs as it does; those on the card are
PyTorch's fake ones, which raise where an operation is given tensors of both. What makes the host wait for the card is
noted: values that are read, and copies between both.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from comfyui_agd.agd_core.comfyui.fused_attention import FUSED_ATTENTION

from .runtime import TinyXL, in_dtype, tiny
from .tiny_families import tiny_model

CARD, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
PACK = Path(__file__).resolve().parents[2]
_aten = torch.ops.aten
_COPY, _SEND = _aten.copy_.default, _aten._to_copy.default
# What the host asks for values of; what has as many results as there are such values.
_READS = (_aten._local_scalar_dense.default, _aten.equal.default)
_COUNTS = (_aten.nonzero.default, _aten.masked_select.default)
# What fills a tensor like another with values that don't depend on it.
_FILLS = tuple(
    getattr(_aten, name).default
    for name in ("new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like")
)
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)
_MOST_KNOWN = 4096  # values of a tensor, of noise levels for example
_FREE = 64 * 1024**3


class _Fakes(FakeTensorMode):
    def __deepcopy__(self, memo: dict) -> "_Fakes":
        return self  # a tensor has it as an attribute, which is copied with the tensor


class Card(TorchDispatchMode):
    """Inside, `cuda` can be used. `waits`: where the host has waited for it so far, in the order of time.

    The values of small tensors of up to two axes are known where they are made of known ones: noise levels. Others that
    are asked for are random.
    """

    def __init__(self, *, trains: bool = False):
        """`trains`: gradients are computed there."""
        super().__init__()
        self.trains = trains
        self.waits: list[str] = []
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._fakes = _Fakes()
        self._generator = torch.Generator().manual_seed(0)

    def __enter__(self) -> "Card":
        self._fakes.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._fakes.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            # What autograd is told, in C++: it would ask for the card's streams. Python code sees the card.
            return META if self.trains else function(*args)
        kwargs = {key: CARD if value == META else value for key, value in (kwargs or {}).items()}
        given = [*_each((*args, *kwargs.values()))]
        if not any(_on_card(each) or _is_cuda(each) for each in given):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if _is_composite(function):  # in inference mode, where autograd hasn't taken it apart
            with self:
                return function.decompose(*args, **kwargs)
        if _reads(function, args, kwargs) or _sends(function, args, kwargs):
            self._note(function)
        if function in _COUNTS:
            found = self._read(function, args, kwargs)
            with self:
                return found.to(CARD, non_blocking=True)
        if _reads(function, args, kwargs):
            return self._read(function, args, kwargs)
        return self._run(function, args, kwargs, given)

    def _note(self, function) -> None:
        frame = sys._getframe(2)
        while frame is not None and not _is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        place = "elsewhere" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.waits.append(f"{function._overloadpacket.__name__} at {place}")

    def _read(self, function, args: tuple, kwargs: dict) -> Any:
        """As if the card's tensors were on the CPU."""
        with unset_fake_temporarily():
            args, kwargs = _mapped(self._value, args), _mapped(self._value, kwargs)
            return function(*args, **kwargs)

    def _value(self, given: Any) -> Any:
        if not _on_card(given):
            return given
        if given in self._known:
            return self._known[given]
        if not given.is_floating_point():
            return torch.ones(given.shape, dtype=given.dtype)
        return (0.5 + torch.rand(given.shape, generator=self._generator)).to(given.dtype)

    def _run(self, function, args: tuple, kwargs: dict, given: list) -> Any:
        result = function(*_mapped(_fake, args), **_mapped(_fake, kwargs))
        self._know(function, args, kwargs, given, result)
        return result

    def _know(self, function, args: tuple, kwargs: dict, given: list, result: Any) -> None:
        results = [each for each in _each((result,)) if isinstance(each, torch.Tensor)]
        known = function in _FILLS or all(not _on_card(each) or each in self._known for each in given)
        if not known or not all(each.ndim <= 2 and each.numel() <= _MOST_KNOWN for each in results):
            for each in results:
                self._known.pop(each, None)  # it may be one that was written to
            return
        here = {key: CPU if _is_cuda(value) else value for key, value in kwargs.items()}
        self._known.update(zip(results, _each((self._read(function, args, here),)), strict=True))


def _each(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _each(value)
        else:
            yield value


def _mapped(function: Callable[[Any], Any], values: Any) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(_mapped(function, value) for value in values)
    if isinstance(values, dict):
        return {key: _mapped(function, value) for key, value in values.items()}
    return function(values)


@functools.cache
def _is_composite(function: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


def _on_card(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def _fake(value: Any) -> Any:
    """A real tensor without its values; one that C++ has made for autograd's device is the card's."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    device = CARD if value.device == META else value.device
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _reads(function, args: tuple, kwargs: dict) -> bool:
    """Whether it needs values of the card. A mask as an index does as well, and a fake one raises."""
    to_cpu = kwargs.get("device") == CPU or (function is _COPY and not _on_card(args[0]))
    return to_cpu or function in _READS or function in _COUNTS


def _sends(function, args: tuple, kwargs: dict) -> bool:
    """Whether values go to the card, and the host waits until they are there."""
    if function in _INDEXED:
        return any(index is not None and not _on_card(index) for index in args[1])
    if kwargs.get("non_blocking") or (function is _COPY and args[2:] == (True,)):
        return False
    return (function is _COPY and not _on_card(args[1])) or (function is _SEND and not _on_card(args[0]))


@functools.cache
def _is_ours(file: str) -> bool:
    path = Path(file).resolve()
    return path != Path(__file__).resolve() and ("ComfyUI-" in file or PACK in path.parents) and ".venv" not in file


def _apply(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which can't replace a parameter by one of another class."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        with torch.no_grad():
            moved = None if parameter is None else function(parameter)
        if moved is not None and moved is not parameter:
            module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
    module._buffers.update({name: None if each is None else function(each) for name, each in module._buffers.items()})
    return module


@contextmanager
def card(*, offloaded: bool = False, trains: bool = False) -> Iterator[Card]:
    """Inside, ComfyUI has a card. `offloaded`: weights stay on the CPU, and come to the card at each use."""
    with ExitStack() as inside:
        for name, value in {
            "get_free_memory": lambda device=None, torch_free_too=False: (_FREE, _FREE) if torch_free_too else _FREE,
            "vram_state": mm.VRAMState.NO_VRAM if offloaded else mm.VRAMState.NORMAL_VRAM,
            "cuda_device_context": lambda device: ExitStack(),
        }.items():
            inside.enter_context(mock.patch.object(mm, name, value, create=True))  # older releases lack one
        inside.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        inside.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        inside.enter_context(mock.patch.object(torch.cuda, "get_rng_state", return_value=None))
        try:
            yield inside.enter_context(Card(trains=trains))
        finally:
            mm.current_loaded_models.clear()


@dataclass(frozen=True)
class Way:
    """How a model is held: its weights' dtype, the one that it computes in, and whether weights are `offloaded`."""

    stored: torch.dtype
    computed: torch.dtype
    offloaded: bool = False

    @property
    def cast(self) -> torch.dtype | None:
        """What ComfyUI casts weights to at each use."""
        return None if self.stored == self.computed else self.computed


WAYS = {
    "fp16": Way(torch.float16, torch.float16),
    "bf16": Way(torch.bfloat16, torch.bfloat16),
    "fp8": Way(torch.float8_e4m3fn, torch.bfloat16),
    "offloaded": Way(torch.bfloat16, torch.bfloat16, offloaded=True),
}
XL = "sdxl"


class _SmallerXL(TinyXL):
    """Of one level: what has no values takes as long for a narrow layer as for a wide one."""

    unet_config = {**TinyXL.unet_config, "channel_mult": (1,), "num_res_blocks": [1]}
    unet_config |= {"transformer_depth": [1], "transformer_depth_output": [1, 1]}


def model_on_card(family: str, way: Way) -> comfy.model_patcher.ModelPatcher:
    """A tiny SDXL, or one of the tiny families, as ComfyUI would have it for a card: PyTorch's attention is used."""
    if family == XL:
        model = in_dtype(tiny(_SmallerXL()), _SmallerXL, way.stored, way.cast)
    else:
        with mock.patch.object(mm, "unet_manual_cast", return_value=way.cast):
            model = tiny_model(family, dtype=way.stored)
    model.load_device = CARD
    model.model_options["transformer_options"].update(FUSED_ATTENTION)
    return model


def with_waits_by_step(model: Any, on: Card) -> tuple[Any, list[list[str]]]:
    """A clone of `model`, and where the host waits for the card in each of the steps in which it is sampled."""
    clone, steps = model.clone(), []

    def step(executor, *args, **kwargs) -> torch.Tensor:
        before = len(on.waits)
        try:
            return executor(*args, **kwargs)
        finally:
            steps.append(on.waits[before:])

    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", step)
    return clone, steps

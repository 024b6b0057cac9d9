"""LoRAs and other patches of weights by a short name: the same in every process, and whether they are loaded or not."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Of a tensor: enough to tell any two trainings apart, and quick where whole models are merged.
_MOST_VALUES = 4096


def patches_digest(*patches: dict[str, Any]) -> str:
    """Of the `patches` of `ModelPatcher`s: their keys, strengths and tensors. "" where there are none."""
    if not any(patches):
        return ""
    digest = hashlib.sha256()
    for part in _parts(patches):
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    """What a patch consists of: tuples and lists as they are nested, the adapters of `comfy.weight_adapter`, tensors.

    Of anything else, functions among it, only its kind is the same in two processes.
    """
    if isinstance(value, torch.Tensor):
        yield from _parts_of_tensor(value)
    elif isinstance(value, dict):
        yield from _parts(sorted(value.items()))
    elif isinstance(value, (list, tuple)):
        yield f"({len(value)} ".encode()
        for each in value:
            yield from _parts(each)
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield f"{value!r} ".encode()
    else:
        yield f"{type(value).__qualname__} ".encode()
        yield from _parts(getattr(value, "weights", None))


def _parts_of_tensor(tensor: torch.Tensor) -> Iterator[bytes]:
    yield f"{tuple(tensor.shape)} ".encode()
    if type(tensor) in (torch.Tensor, nn.Parameter):  # others, quantised ones, hold no values to be read one by one
        values = tensor.detach().reshape(-1)
        yield values[:: max(1, values.numel() // _MOST_VALUES)].to("cpu", torch.float32).numpy().tobytes()

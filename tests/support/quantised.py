"""Tiny models of `tiny_families.py` as people store large ones: in 8 bits, in ComfyUI's ways and in a pack's."""

import json

import comfy.model_patcher
import comfy.ops
import torch
from torch import nn

from .family_adapters import base_of
from .tiny_families import tiny_model

BLOCK = 32  # weights that have one scale in `PackedOps`


class PackedWeight(torch.Tensor):
    """Bytes, a row for each BLOCK weights: an fp16 scale and int8 values. Its `shape` is the weight's that it stands
    for, as packs have it; `clone` and `detach` give itself."""

    weight_shape: torch.Size

    @classmethod
    def of(cls, weight: torch.Tensor) -> "PackedWeight":
        blocks = weight.reshape(-1, BLOCK)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
        values = (blocks / scale.float().clamp(min=1e-12)).round().to(torch.int8)
        return torch.cat([scale.view(torch.uint8), values.view(torch.uint8)], 1).as_subclass(cls)._standing_for(weight)

    def _standing_for(self, weight: torch.Tensor) -> "PackedWeight":
        self.weight_shape = weight.shape
        return self

    def unpacked(self) -> torch.Tensor:
        """The weight, fp32."""
        rows = self.as_subclass(torch.Tensor).to(torch.uint8)  # ComfyUI may have cast the bytes
        scale, values = rows[:, :2].contiguous().view(torch.float16), rows[:, 2:].contiguous().view(torch.int8)
        return (scale.float() * values.float()).reshape(self.weight_shape)

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return getattr(self, "weight_shape", self.size())

    def to(self, *args, **kwargs) -> "PackedWeight":
        return super().to(*args, **kwargs)._standing_for(self)

    def clone(self, *args, **kwargs) -> "PackedWeight":
        return self

    def detach(self) -> "PackedWeight":
        return self


class PackedOps(comfy.ops.manual_cast):
    """A pack's operations for a model some of whose linear layers have packed weights."""

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
            weight = state.get(f"{prefix}weight")
            if isinstance(weight, PackedWeight):
                self.weight = nn.Parameter(weight, requires_grad=False)
                bias = state.get(f"{prefix}bias")
                self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            else:
                super()._load_from_state_dict(state, prefix, *args)

        def forward_comfy_cast_weights(self, x: torch.Tensor) -> torch.Tensor:
            if not isinstance(self.weight, PackedWeight):
                return super().forward_comfy_cast_weights(x)
            weight = self.weight.to(x.device).unpacked().to(x.dtype)
            return torch.nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x))

        # How ComfyUI gives a LoRA's changes to such a layer.

        def convert_weight(self, weight: torch.Tensor, **kwargs) -> torch.Tensor:
            return weight.unpacked() if isinstance(weight, PackedWeight) else weight

        def set_weight(self, weight: torch.Tensor, inplace_update=False, seed=None, return_weight=False, **kwargs):
            packed = PackedWeight.of(weight.float())
            if return_weight:
                return packed
            self.weight = nn.Parameter(packed, requires_grad=False)
            return None


def _scaled(key: str, weight: torch.Tensor, kind: str, largest: float) -> dict[str, torch.Tensor]:
    """A weight as ComfyUI's files of that `comfy_quant` format have it."""
    scale, layer = weight.abs().amax() / largest, key.removesuffix(".weight")
    stored = (weight / scale).round().to(torch.int8) if kind.startswith("int8") else weight / scale
    return {
        key: stored.to(torch.int8 if kind.startswith("int8") else torch.float8_e4m3fn),
        f"{layer}.weight_scale": scale,
        f"{layer}.comfy_quant": torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8),
    }


def _stored(key: str, weight: torch.Tensor, way: str) -> dict[str, torch.Tensor]:
    if way == "fp8-scaled":
        return _scaled(key, weight, "float8_e4m3fn", 448.0)
    if way == "int8":
        return _scaled(key, weight, "int8_tensorwise", 127.0)
    return {key: PackedWeight.of(weight)}


# fp8: what the loader's weight_dtype does; fp8-scaled, int8: ComfyUI's own layers; packed: as in the GGUF pack.
WAYS = ("fp8", "fp8-scaled", "int8", "packed")


@torch.inference_mode()  # as ComfyUI's nodes load them
def quantised_model(name: str, way: str) -> comfy.model_patcher.ModelPatcher:
    """`tiny_model(name)` with the linear layers of its blocks stored in one of WAYS."""
    if way == "fp8":
        return tiny_model(name, dtype=torch.float8_e4m3fn)
    packed = {f"{layer.path}.{linear.path}.weight" for layer in base_of(name).layers for linear in layer.linears}

    def stored(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        each = (_stored(key, weight, way) if key in packed else {key: weight} for key, weight in state.items())
        return {key: weight for entries in each for key, weight in entries.items()}

    return tiny_model(name, stored, **({"custom_operations": PackedOps} if way == "packed" else {}))

"""An adapter as one node applies it to a MODEL."""

import math
import uuid
from dataclasses import dataclass, field

import torch
from comfy.model_patcher import ModelPatcher

from ...adapter_file import AdapterFileError, AdapterInfo, check_base
from ..backbones import describe_base
from .settings import GuidanceSettings


@dataclass(frozen=True)
class AppliedAdapter:
    """`patcher`: its weights, managed by ComfyUI; `lora`: what of it can be merged into the base's weights, at strength
    omega - 1; `unconditional`: (d,), the mean token of the one that it was trained with, on the CPU, so that nothing
    waits for the weights' device; `source`: its name in messages."""

    info: AdapterInfo
    patcher: ModelPatcher
    settings: GuidanceSettings
    lora: dict[str, torch.Tensor]
    unconditional: torch.Tensor
    source: str
    identity: uuid.UUID = field(default_factory=uuid.uuid4)

    def omega(self, cfg_scale: float | None) -> float | None:
        """`cfg_scale`: that of the sampler, None where it isn't known."""
        return cfg_scale if self.settings.guidance_scale is None else self.settings.guidance_scale

    def acts_at(self, omega: float | None) -> bool:
        """Whether the model is another one with it, at that omega."""
        return omega is not None and (self.info.config.kind.acts_at_1 or not math.isclose(omega, 1.0))


def check_adapters(adapters: tuple[AppliedAdapter, ...], base: ModelPatcher) -> None:
    """Whether they are for `base` as it is sampled: nodes behind the loader may have changed it.

    Raises `AdapterFileError`.
    """
    sampling, cast = (base.get_model_object(name) for name in ("model_sampling", "manual_cast_dtype"))
    described, dtype = describe_base(base.model, sampling), cast or base.model.get_dtype()
    for applied in adapters:
        check_base(applied.info, described, applied.source)
        _check_range(applied, dtype)


def _check_range(applied: AppliedAdapter, dtype: torch.dtype) -> None:
    """Raises `AdapterFileError` where the model computes in a dtype that the adapter's weights are too large for."""
    weights = applied.patcher.model.state_dict().values()
    largest = torch.finfo(dtype).max
    if any(torch.finfo(w.dtype).max > largest and not w.to(dtype).isfinite().all() for w in weights):
        raise AdapterFileError(
            f"Weights of the adapter {applied.source} are too large for {dtype}, in which this model computes behind "
            "the node: run it in bf16 or fp32, or train the adapter again."
        )

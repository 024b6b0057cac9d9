"""Applying an adapter to a MODEL: what AGD Adapter Loader and AGD Apply Adapter do."""

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...adapter_file import AdapterInfo, check_base
from ...lora import low_rank_as_lora
from ..apply_model import register
from ..backbones import backbone_of, check_adapter, describe_base, is_known
from ..guided_step import KEY
from .applied_adapter import AppliedAdapter
from .managed_weights import managed
from .messages import KNOWN_BY_STRUCTURE, Notify, log_warning, without_repeats
from .outer_sample import AdapterGuidance
from .settings import GuidanceSettings


def apply_adapter(
    model: ModelPatcher,
    info: AdapterInfo,
    weights: dict[str, torch.Tensor],
    settings: GuidanceSettings = GuidanceSettings(),
    *,
    source: str,
    notify: Notify = log_warning,
) -> ModelPatcher:
    """A clone of `model` that samples with guidance embedded, one evaluation per step.

    At strength 0, and for steps that are not to be guided, the model runs as if there were no adapter; on a model that
    has adapters already, this one's residuals are added to theirs. Raises `AdapterFileError` where the adapter was made
    for another base or its weights can't be used; `source` names it there. Raises `UnsupportedModel` where the base's
    linear layers are not those that the adapter changes.
    """
    check_base(info, describe_base(model.model, model.get_model_object("model_sampling")), source)
    check_adapter(backbone_of(model.model), info.config)
    clone = model.clone()
    if not settings.has_effect:
        return clone
    if not is_known(model.model):
        notify(KNOWN_BY_STRUCTURE)
    lora = low_rank_as_lora(info, weights) if info.config.kind.merges else {}
    unconditional = weights["unconditional"].float().mean(0).cpu()
    applied = AppliedAdapter(info, managed(info, weights, model, source), settings, lora, unconditional, source)
    guidance = AdapterGuidance((*_adapters_of(clone), applied), without_repeats(notify))
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, guidance)
    clone.set_additional_models(KEY, [applied.patcher for applied in guidance.adapters])
    register(clone)
    return clone


def _adapters_of(model: ModelPatcher) -> tuple[AppliedAdapter, ...]:
    """Those that a MODEL has. Raises `ValueError` where it is guided without one."""
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    if not all(isinstance(wrapper, AdapterGuidance) for wrapper in wrappers):
        raise ValueError(
            "This model has training-free guidance of an AGD node already; an adapter is for a model without."
        )
    return tuple(applied for wrapper in wrappers for applied in wrapper.adapters)

"""An adapter's weights as a model of ComfyUI's, which counts, offloads and unloads them."""

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch

from ...adapter import Adapter
from ...adapter_file import AdapterFileError, AdapterInfo
from ...config import AdapterConfig


def managed(
    info: AdapterInfo, weights: dict[str, torch.Tensor], base: comfy.model_patcher.ModelPatcher, source: str
) -> comfy.model_patcher.ModelPatcher:
    """Weights as a ModelPatcher of its own, which ComfyUI counts, offloads and unloads, in `base`'s compute dtype.

    Random features of omega stay as they are: rounded, they would be others. Raises `AdapterFileError`
    naming `source` where a weight is too large for that dtype.
    """
    dtype = base.model.manual_cast_dtype or base.model.get_dtype()
    adapter = _empty(info.config)
    exact = {key for key, _ in adapter.named_buffers()} - {"unconditional"}  # that is a prompt's tokens
    # Copied: the given ones may be another model's, too.
    weights = {key: t.to(t.dtype if key in exact else dtype, copy=True) for key, t in weights.items()}
    overflown = sorted(key for key, tensor in weights.items() if not tensor.isfinite().all())
    if overflown:
        raise AdapterFileError(
            f"Weights of the adapter {source} are NaN or too large for {dtype}, in which this model computes "
            f"({', '.join(overflown[:8])}): run the model in bf16 or fp32, or train the adapter again."
        )
    return _patcher(adapter, weights, base.load_device)


def _empty(config: AdapterConfig) -> Adapter:
    return Adapter(config, comfy.ops.manual_cast).requires_grad_(False)


def _patcher(
    adapter: Adapter, weights: dict[str, torch.Tensor], load_device: torch.device
) -> comfy.model_patcher.ModelPatcher:
    """The adapter, which gets these weights."""
    offload_device = comfy.model_management.unet_offload_device()
    patcher = comfy.model_patcher.CoreModelPatcher(adapter, load_device=load_device, offload_device=offload_device)
    adapter.load_state_dict(weights, assign=True)
    if hasattr(patcher, "cached_patcher_init"):  # by which newer releases copy a model for another GPU
        patcher.cached_patcher_init = _copied, (adapter, load_device)
    return patcher


def _copied(adapter: Adapter, load_device: torch.device) -> comfy.model_patcher.ModelPatcher:
    weights = {key: tensor.to("cpu", copy=True) for key, tensor in adapter.state_dict().items()}
    return _patcher(_empty(adapter.config), weights, load_device)

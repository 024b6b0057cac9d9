"""What a base family is to adapters: its layers, how its evaluation is intercepted, its names.

`LAYOUTS` are the ways in which networks are built, a file each; `agd_core/families.py` has the families' rows.
"""

import hashlib

import comfy.utils
import torch
from comfy import model_sampling
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...config import BaseInfo
from ...families import find_family
from .backbone import INSTEAD, Backbone, UnsupportedModel
from .linears import check_adapter
from .transformer import Transformer
from .unet import UNet

__all__ = ["Backbone", "UnsupportedModel", "backbone_of", "check_adapter", "describe_base", "is_known", "is_trained_on"]

LAYOUTS: dict[str, type[Backbone]] = {layout.layout: layout for layout in (UNet, Transformer)}

# How the model's output is read, under the names of ComfyUI's ModelType; subclasses come first.
_PREDICTIONS = (
    (model_sampling.EDM, "EDM"),
    (model_sampling.V_PREDICTION, "V_PREDICTION"),
    (model_sampling.IMG_TO_IMG, "IMG_TO_IMG"),
    (model_sampling.X0, "X0"),
    (model_sampling.CONST, "FLOW"),
    (model_sampling.EPS, "EPS"),
)
# What is kept of ComfyUI's configuration of a network.
_ARCHITECTURE = (
    *("model_channels", "in_channels", "out_channels", "adm_in_channels", "context_dim", "channel_mult"),
    "num_res_blocks",
)


def backbone_of(model) -> Backbone:
    """A ComfyUI `BaseModel`'s backbone: by its family's row, or else by structure. Raises `UnsupportedModel`."""
    network = model.diffusion_model
    for ancestor in type(model.model_config).__mro__:  # a pack's own family may derive from one of ComfyUI's
        family = find_family(ancestor.__name__)
        if family is not None and LAYOUTS[family.layout].fits(network, family):
            return LAYOUTS[family.layout](network, family)
    return layout_of(network)  # packs keep a family's configuration for networks of their own


def is_known(model) -> bool:
    """Whether a `BaseModel`'s family is told by its row, or is a UNet, which all are alike."""
    backbone = backbone_of(model)
    return backbone.family is not None or isinstance(backbone, UNet)


def layout_of(network: nn.Module) -> Backbone:
    """By structure alone. Raises `UnsupportedModel`."""
    for layout in LAYOUTS.values():
        if layout.recognises(network):
            return layout(network)
    raise UnsupportedModel(
        "This kind of model can't have an adapter: SD 1.5, SD 2, SDXL and most diffusion transformers can "
        f"(docs/families.md). {INSTEAD} Details: this model is a {type(network).__name__}, which has neither a UNet's "
        "input_blocks, middle_block and output_blocks nor lists of blocks and a layer for the prompt."
    )


def _prediction(sampling, otherwise: str) -> str:
    name = next((name for kind, name in _PREDICTIONS if isinstance(sampling, kind)), otherwise)
    if name == "V_PREDICTION" and isinstance(sampling, model_sampling.ModelSamplingContinuousEDM):
        return "V_PREDICTION_EDM"
    return name


def describe_base(model, sampling=None) -> BaseInfo:
    """What a ComfyUI `BaseModel` is, read without touching its weights. Raises `UnsupportedModel`.

    `sampling` is the MODEL's `get_model_object("model_sampling")`: nodes such as ModelSamplingDiscrete set another
    prediction there than the one that ComfyUI detected in the checkpoint, which is taken without it.
    """
    config, backbone = model.model_config.unet_config, backbone_of(model)
    architecture = {key: config[key] for key in _ARCHITECTURE if config.get(key) is not None}
    if channels := backbone.time_channels():
        architecture["time_channels"] = channels
    return BaseInfo(
        family=type(model.model_config).__name__,
        prediction=_prediction(sampling or model.model_sampling, otherwise=model.model_type.name),
        layers=backbone.layers(),
        architecture=architecture,
        layout=backbone.layout,
        vector=backbone.vector(),
    )


def fingerprint(model: ModelPatcher) -> str:
    """A short name for the weights of a MODEL's checkpoint, from the first and the last layer."""
    # Rounded to bf16: the same checkpoint loaded in another precision should mostly keep its name.
    weights = [_own_weight(model, f"diffusion_model.{name}") for name in backbone_of(model.model).first_and_last()]
    parts = [tensor.detach().cpu().to(torch.bfloat16).view(torch.int16).numpy().tobytes() for tensor in weights]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _own_weight(model: ModelPatcher, key: str) -> torch.Tensor:
    """The checkpoint's, whatever has been sampled last: ComfyUI leaves weights patched, and keeps the checkpoint's for
    all clones of a MODEL."""
    return model.backup[key].weight if key in model.backup else comfy.utils.get_attr(model.model, key)


def is_trained_on(base: BaseInfo, model: ModelPatcher) -> bool:
    """Whether `base` is of this MODEL's checkpoint, as far as fingerprints tell; a base without one may be."""
    return base.fingerprint in ("", fingerprint(model))

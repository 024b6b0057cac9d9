"""What a ComfyUI model is, read from its structure: its cross-attention sites and its kind."""

import hashlib
from collections.abc import Iterator
from operator import attrgetter

import torch
from comfy import model_sampling
from torch import nn

from ...config import BaseInfo, Site
from ...errors import AGDError
from ...kinds.low_rank import layers_of

# How the model's output is read, under the names of ComfyUI's ModelType; subclasses come first.
_PREDICTIONS = (
    (model_sampling.EDM, "EDM"),
    (model_sampling.V_PREDICTION, "V_PREDICTION"),
    (model_sampling.IMG_TO_IMG, "IMG_TO_IMG"),
    (model_sampling.X0, "X0"),
    (model_sampling.EPS, "EPS"),
)
_INSTEAD = "Choose 'training-free' in AGD Adapter Loader, which needs no adapter."


class UnsupportedModel(AGDError, ValueError):
    """A model whose structure AGD cannot adapt."""


def site_name(block: tuple[str, int], index: int) -> str:
    """The name of a site from what ComfyUI tells attention patches: ("input", 1) and 0 -> "input_1_0"."""
    return f"{block[0]}_{block[1]}_{index}"


def block_of(name: str) -> tuple[str, int, int]:
    """The inverse of `site_name`, under which replacements of attention are kept: "input_1_0" -> ("input", 1, 0)."""
    kind, number, index = name.rsplit("_", 2)
    return kind, int(number), int(index)


def _blocks(unet: nn.Module) -> Iterator[tuple[tuple[str, int], nn.Module]]:
    """The blocks under the names that `UNetModel._forward` puts into `transformer_options["block"]`."""
    yield from ((("input", i), block) for i, block in enumerate(unet.input_blocks))
    if unet.middle_block is not None:
        yield ("middle", 0), unet.middle_block
    yield from ((("output", i), block) for i, block in enumerate(unet.output_blocks))


def transformers(unet: nn.Module) -> dict[str, nn.Module]:
    """By site name, a ComfyUI `UNetModel`'s transformer blocks with a cross-attention, in the order of evaluation.

    Raises `UnsupportedModel` for anything that is not built that way.
    """
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        raise UnsupportedModel(
            f"This kind of model can't have an adapter: SD 1.5, SD 2, SDXL and models made from them can. {_INSTEAD} "
            f"Details: this model is a {type(unet).__name__}, which has no input_blocks, middle_block and "
            "output_blocks."
        )
    found = {}
    for place, block in _blocks(unet):
        spatial = [module for module in block if hasattr(module, "transformer_blocks")]
        if len(spatial) > 1 or any(hasattr(module, "time_stack") for module in spatial):
            raise UnsupportedModel(
                f"Video models can't have an adapter: SD 1.5, SD 2, SDXL and models made from them can. {_INSTEAD} "
                f"Details: AGD adapts image UNets, but block {place} of this one is a video block."
            )
        for module in spatial:
            for index, transformer in enumerate(module.transformer_blocks):
                if transformer.attn2 is not None and not transformer.switch_temporal_ca_to_sa:
                    found[site_name(place, index)] = transformer
    if not found:
        raise UnsupportedModel(
            f"This model can't have an adapter: it reads no prompt through cross-attention. {_INSTEAD}"
        )
    return found


def find_sites(unet: nn.Module) -> tuple[Site, ...]:
    """The sites of `transformers`, as data. Works on the meta device."""
    return tuple(
        Site(name, transformer.attn2.to_q.in_features, transformer.attn2.to_k.in_features)
        for name, transformer in transformers(unet).items()
    )


def linear_layers(block: nn.Module, site: Site) -> dict[str, nn.Module]:
    """The linear layers of a site's transformer block that low-rank changes are for, by their path in it.

    Raises `UnsupportedModel` where one is built otherwise.
    """
    found = {}
    for path, expected in layers_of(site).items():
        try:
            layer = attrgetter(path)(block)
        except AttributeError:
            layer = None
        sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
        if sizes != expected:
            shown = "nothing" if layer is None else f"a {type(layer).__name__} from {sizes[0]} to {sizes[1]} channels"
            raise UnsupportedModel(
                "This model's layers are built otherwise than an adapter with a rank needs: train one of kind delta "
                f"with rank 0. Details: such an adapter needs {path} in block {site.name} to be a linear layer from "
                f"{expected[0]} to {expected[1]} channels, but this model has {shown} there."
            )
        found[path] = layer
    return found


def check_linear_layers(unet: nn.Module, sites: tuple[Site, ...]) -> None:
    """Raises `UnsupportedModel` where low-rank changes at these sites can't be made."""
    blocks = transformers(unet)
    for site in sites:
        linear_layers(blocks[site.name], site)


def fingerprint(unet: nn.Module) -> str:
    """A short name for these weights, from the first and the last layer."""
    tensors = [unet.input_blocks[0][0].weight, unet.out[-1].weight]
    # Rounded to bf16: the same checkpoint loaded in another precision should mostly keep its name.
    parts = [tensor.detach().cpu().to(torch.bfloat16).view(torch.int16).numpy().tobytes() for tensor in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def is_trained_on(base: BaseInfo, unet: nn.Module) -> bool:
    """Whether `base` is of these weights, as far as their fingerprints tell; a base without one may be."""
    return base.fingerprint in ("", fingerprint(unet))


def _prediction(sampling, otherwise: str) -> str:
    name = next((name for kind, name in _PREDICTIONS if isinstance(sampling, kind)), otherwise)
    if name == "V_PREDICTION" and isinstance(sampling, model_sampling.ModelSamplingContinuousEDM):
        return "V_PREDICTION_EDM"
    return name


def describe_base(model, sampling=None) -> BaseInfo:
    """What a ComfyUI `BaseModel` is, read without touching its weights. Raises `UnsupportedModel`.

    `sampling` is the MODEL's `get_model_object("model_sampling")`: nodes such as ModelSamplingDiscrete set another
    prediction there than the one that ComfyUI detected in the checkpoint.
    """
    config = model.model_config.unet_config
    kept = ("model_channels", "in_channels", "out_channels", "adm_in_channels", "context_dim", "channel_mult")
    return BaseInfo(
        family=type(model.model_config).__name__,
        prediction=_prediction(sampling, otherwise=model.model_type.name),
        sites=find_sites(model.diffusion_model),
        architecture={key: config[key] for key in kept if config.get(key) is not None},
    )

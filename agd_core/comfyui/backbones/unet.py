"""UNets with cross-attention: SD 1.5, SD 2, SDXL and what was made of them, as ComfyUI builds them (`UNetModel`).

An evaluation is intercepted by stateless hooks. `intercept` hands the step on as an argument of the network's own: for
ComfyUI's compile node drops every guard on `transformer_options`, so that a graph compiled without adapters, or with
others, would run on; on an argument of its own the guards stay. A DIFFUSION_MODEL wrapper takes it and prepares the
adapters. For this evaluation it puts

- the last attn2_patch, which sees what the attention is really given after all other nodes;
- the first attn2_output_patch, which sees what it returns before them;
- for adapters that work inside the attention, an attention of our own around what was there;
- for adapters of low rank, forward hooks on the linear layers (`linears.py`).
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import comfy.ldm.modules.attention
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...config import AdapterLayer, Linear
from ..guided_step import KEY, GuidedStep
from ..prompt import KeysValues
from .backbone import INSTEAD, Backbone, UnsupportedModel
from .linears import adapted_linears

PREPARED = "agd_prepared"
_INPUT = "agd_input"
# The linear layers of a transformer block, in the order of an adapter's weights.
_SELF_KEYS_VALUES, _CROSS_KEYS_VALUES = ("attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")
_LINEARS = (
    *("attn1.to_q", *_SELF_KEYS_VALUES, "attn1.to_out.0"),
    *("attn2.to_q", "attn2.to_out.0", *_CROSS_KEYS_VALUES),
    *("ff.net.0.proj", "ff.net.2"),
)


def layer_name(block: tuple[str, int], index: int) -> str:
    """The name of an adapter layer from what ComfyUI tells attention patches: ("input", 1) and 0 -> "input_1_0"."""
    return f"{block[0]}_{block[1]}_{index}"


def place_of(name: str) -> tuple[str, int, int]:
    """The inverse of `layer_name`, under which replacements of attention are kept: "input_1_0" -> ("input", 1, 0)."""
    kind, number, index = name.rsplit("_", 2)
    return kind, int(number), int(index)


class UNet(Backbone):
    """An adapter layer is a transformer block with a cross-attention, called by its place: "input_1_0"."""

    layout = "unet"

    @classmethod
    def recognises(cls, network: nn.Module) -> bool:
        return all(hasattr(network, name) for name in ("input_blocks", "middle_block", "output_blocks"))

    def _blocks(self) -> Iterator[tuple[tuple[str, int], str, nn.Module]]:
        """The blocks, by the names that `UNetModel._forward` puts into `transformer_options["block"]`, and paths."""
        network = cast(Any, self.network)
        yield from ((("input", i), f"input_blocks.{i}", block) for i, block in enumerate(network.input_blocks))
        if network.middle_block is not None:
            yield ("middle", 0), "middle_block", network.middle_block
        yield from (
            (("output", i), f"output_blocks.{i}", block) for i, block in enumerate(cast(Any, network).output_blocks)
        )

    def _transformers(self) -> Iterator[tuple[str, str, Any]]:
        """Name, path and module of the transformer blocks with a cross-attention, in the order of evaluation."""
        for place, path, block in self._blocks():
            children: list[tuple[str, Any]] = list(block.named_children())
            spatial = [(key, module) for key, module in children if hasattr(module, "transformer_blocks")]
            if len(spatial) > 1 or any(hasattr(module, "time_stack") for _, module in spatial):
                raise UnsupportedModel(
                    f"Video models can't have an adapter: SD 1.5, SD 2, SDXL and models made from them can. {INSTEAD} "
                    f"Details: AGD adapts image UNets, but block {place} of this one is a video block."
                )
            for key, module in spatial:
                for index, transformer in enumerate(module.transformer_blocks):
                    if transformer.attn2 is not None and not transformer.switch_temporal_ca_to_sa:
                        yield layer_name(place, index), f"{path}.{key}.transformer_blocks.{index}", transformer

    def layers(self) -> tuple[AdapterLayer, ...]:
        found = tuple(_layer(name, path, block) for name, path, block in self._transformers())
        if not found:
            raise UnsupportedModel(
                f"This model can't have an adapter: it reads no prompt through cross-attention. {INSTEAD}"
            )
        return found

    def checkpointed_blocks(self) -> list[nn.Module]:
        return [module for module in self.network.modules() if isinstance(module, (BasicTransformerBlock, ResBlock))]

    @contextmanager
    def intercept(self, step: GuidedStep) -> Iterator[dict[str, Any]]:
        # Not from what patches are told: blocks of other packs tell them less.
        attentions = {name: block.attn2 for name, _, block in self._transformers()}
        step.places[:] = attentions
        if step.guides_attention:
            own = {name: attentions[name] for name in step.guided_layers()}
            step.attentions.update({name: (attn.heads, attn.attn_precision) for name, attn in own.items()})
        yield {KEY: step}

    def time_channels(self) -> int:
        embedding = getattr(self.network, "time_embed", None)
        return embedding[-1].out_features if embedding is not None else 0

    def block_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Adapters may be given another prompt on the way, which changes what was prepared."""
        kept = super().block_arguments(kwargs)
        options = kept.get("transformer_options", {})
        if PREPARED in options:
            step, prepared = options[PREPARED]
            options[PREPARED] = step, [(adapter, copy.copy(shared)) for adapter, shared in prepared]
        return kept

    def keys_values(
        self, model: Any, arguments: dict[str, Any], x: torch.Tensor, step: GuidedStep
    ) -> Iterator[tuple[str, KeysValues]]:
        context = arguments["c_crossattn"].to(x.device, model.get_dtype_inference())
        guided = step.guided_layers()
        for name, _, block in self._transformers():
            if name in guided:
                yield name, KeysValues(block.attn2.to_k(context), block.attn2.to_v(context))

    def first_and_last(self) -> tuple[str, str]:
        return "input_blocks.0.0.weight", f"out.{len(cast(Any, self.network).out) - 1}.weight"


def _layer(name: str, path: str, block: Any) -> AdapterLayer:
    attention = block.attn2
    prompt = _CROSS_KEYS_VALUES + (_SELF_KEYS_VALUES if block.disable_self_attn else ())
    linears = (_linear(block, linear, linear in prompt) for linear in _LINEARS)
    return AdapterLayer(
        name,
        path,
        width=attention.to_q.in_features,
        context_dim=attention.to_k.in_features,
        innermost=place_of(name)[0] == "middle",
        linears=tuple(linear for linear in linears if linear is not None),
    )


def _linear(block: nn.Module, path: str, reads_prompt: bool) -> Linear | None:
    try:
        module: Any = block.get_submodule(path)
    except AttributeError:
        return None
    return Linear(path, module.in_features, module.out_features, reads_prompt)


def diffusion_model(executor, x, timesteps, context=None, y=None, control=None, transformer_options={}, **kwargs):
    """DIFFUSION_MODEL wrapper: x (b, c, h, w), timesteps (b,), context (b, m, d)."""
    step = kwargs.pop(KEY, None)
    if step is not None:
        time = embed_time(executor.class_obj, timesteps, x.dtype) if step.uses_time else None
        prepared = step.prepare(timesteps, context, x.dtype, time=time)
        transformer_options = {**_with_our_patches(transformer_options), PREPARED: (step, prepared)}
        if step.guides_attention:
            transformer_options = _with_guided_attention(transformer_options, step.attentions)
        if step.changes_linears:
            with adapted_linears(UNet(executor.class_obj), prepared):
                return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def embed_time(network: Any, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The network's own embedding (b, e) of timesteps (b,), as it is before anything is added to it."""
    return network.time_embed(timestep_embedding(timesteps, network.model_channels).to(dtype))


UNet.wrappers = {WrappersMP.DIFFUSION_MODEL: diffusion_model}


def _with_our_patches(transformer_options: dict) -> dict:
    """A copy in which ours are the last before the attentions and the first after them."""
    patches = transformer_options.get("patches", {})
    before, after = ([*patches.get(name, ())] for name in ("attn2_patch", "attn2_output_patch"))
    ours = {"attn2_patch": [*before, remember_input], "attn2_output_patch": [add_residual, *after]}
    return {**transformer_options, "patches": {**patches, **ours}}


def _with_guided_attention(transformer_options: dict, attentions: dict[str, tuple]) -> dict:
    """A copy in which `guided_attention` is around each layer's attention, another node's replacement included."""
    replacements = transformer_options.get("patches_replace", {})
    before = replacements.get("attn2", {})
    ours = {}
    for name, (heads, precision) in attentions.items():
        place = place_of(name)
        base = functools.partial(_base_attention, heads=heads, precision=precision)
        attend = before.get(place, before.get(place[:2], base))  # as ComfyUI looks them up
        ours[place] = functools.partial(guided_attention, name=name, attend=attend)
    return {**transformer_options, "patches_replace": {**replacements, "attn2": {**before, **ours}}}


def _base_attention(q, k, v, extra_options, *, heads: int, precision):
    return comfy.ldm.modules.attention.optimized_attention(
        q, k, v, heads, attn_precision=precision, transformer_options=extra_options
    )


def token_grid(tokens: int, sizes: torch.Size) -> tuple[int, ...] | None:
    """How a layer's image tokens lie in latents of those `sizes`, (h, w). None: they don't."""
    height, width = sizes
    while height * width > tokens:  # the levels, each half of the one before
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return (height, width) if height * width == tokens else None


def guided_attention(q, k, v, extra_options, *, name: str, attend: Callable):
    """An attn2 replacement: q (b, tokens, w), k and v (b, m, w) -> what goes into `to_out`, (b, tokens, w)."""
    attended = out = attend(q, k, v, extra_options)
    if _INPUT not in extra_options:
        return out
    step, prepared = extra_options[PREPARED]
    _, h, _ = extra_options[_INPUT]
    # Replacements such as IP-Adapter's then take what they have for the unconditional.
    unconditional = {**extra_options, "cond_or_uncond": [1] * len(extra_options.get("cond_or_uncond", [0]))}
    for active, (adapter, shared) in zip(step.active, prepared, strict=True):
        if adapter.guides(name):
            parts = []
            for each in active.negatives:
                unwanted = each.negative.keys_values_at(name, len(q))
                difference = attended - attend(q, unwanted.keys, unwanted.values, unconditional)
                parts.append(each.weigh(difference, token_grid))
            out = adapter.add_inside_attention(name, out, sum(parts[1:], parts[0]), h, shared)
    return out


def _place_of(step: GuidedStep, extra_options: dict) -> str | None:
    """The block that a patch is called for. Those of other packs may not say; they come in the order of evaluation."""
    if "block" in extra_options and "block_index" in extra_options:
        return layer_name(extra_options["block"], extra_options["block_index"])
    last = step.visited[-1:]
    following = step.places[step.places.index(last[0]) + 1 :] if last else step.places
    return following[0] if following else None


def remember_input(n, context, value, extra_options):
    """attn2_patch: n (b, tokens, w) is what the attention is given, context (b, m, d)."""
    if PREPARED in extra_options:
        step, _ = extra_options[PREPARED]
        if (name := _place_of(step, extra_options)) in step.places:
            step.visited.append(name)
            # A dict of this block's evaluation alone: nothing outlives it.
            extra_options[_INPUT] = (name, n, context)
    return n, context, value


def add_residual(out, extra_options):
    """attn2_output_patch: out (b, tokens, w)."""
    remembered = extra_options.pop(_INPUT, None)
    if remembered is None:
        return out
    name, h, context = remembered
    for adapter, shared in extra_options[PREPARED][1]:
        if adapter.changes_attention_output and adapter.has_layer(name):
            out = adapter.add_after_attention(name, out, h, context, shared)
    return out

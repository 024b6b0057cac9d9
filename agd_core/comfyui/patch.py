"""The hooks that let adapters take part in a model's evaluations, for sampling and for training alike.

Three stateless hooks on a clone of the model; what an evaluation needs travels with it, as a `Step`:

1. An APPLY_MODEL wrapper hands the step on to the diffusion model as an argument of its own.
2. A DIFFUSION_MODEL wrapper prepares the adapters: once per evaluation, what does not depend on the image. For this
   evaluation it puts the last attn2_patch, which sees what the attention is really given after all other nodes; the
   first attn2_output_patch, which sees what it returns before them; and, for adapters that work inside the attention,
   an attention of our own around what was there.
3. Those remember a site's input, and add the site's residual.

Adapters that change the blocks' linear layers do so through forward hooks on them, which are there for the time of one
evaluation only, see `adapted_linears`.

Without a step they pass everything through untouched.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from ..adapter import Adapter, Prepared
from ..adapter_file import AdapterFileError, AdapterInfo
from .backbones.unet import block_of, linear_layers, site_name, transformers
from .sampling.negatives import WeightedNegative

# Under this name ComfyUI keeps our wrappers and additional models, and transformer_options what the hooks pass on.
KEY = "agd"
PREPARED = "agd_prepared"
_INPUT = "agd_input"
_COMPILE = "torch.compile"  # ComfyUI's key of what its compile nodes register


@dataclass(frozen=True)
class Active:
    """An adapter at work. Numbers are tensors, for torch.compile would take plain ones for constants.

    `omega`: (1,) or (b,), one per row; `strength`: (1,). `negatives`: for adapters that use them, else empty. `merged`:
    whether what it does to linear layers is in their weights, see `merging.py`.
    """

    adapter: Adapter
    omega: torch.Tensor
    strength: torch.Tensor
    negatives: tuple[WeightedNegative, ...] = ()
    merged: bool = False

    @property
    def changes_linears(self) -> bool:
        """Whether it works on the base's linear layers while they are evaluated."""
        return self.adapter.config.changes_linears and not self.merged

    def for_rows(self, areas: list, shape: torch.Size) -> "Active":
        return replace(self, negatives=tuple(share.cropped(areas, shape) for share in self.negatives))


@dataclass
class Step:
    """What the hooks need in one step of sampling or training.

    `areas`: of conditions that have one, by their uuid; `visited` lists the sites of the last evaluation; `attentions`:
    heads and precision of the sites' attentions, for adapters that work inside them.
    """

    active: tuple[Active, ...]
    areas: dict = field(default_factory=dict)
    visited: list[str] = field(default_factory=list)
    attentions: dict[str, tuple] = field(default_factory=dict)

    def sites(self) -> list[str]:
        """All sites in the order of evaluation."""
        return [site.name for site in self.active[0].adapter.config.sites]

    @property
    def changes_linears(self) -> bool:
        """Whether an adapter works on the base's linear layers, where torch.compile would not see it come and go."""
        return any(active.changes_linears for active in self.active)

    @property
    def works_at_sites(self) -> bool:
        """Whether an adapter adds to what attentions return, or works inside them."""
        return any(active.adapter.place != "linear" for active in self.active)

    @property
    def works_inside(self) -> bool:
        """Whether an adapter works inside the attentions."""
        return any(active.adapter.place == "attention" for active in self.active)

    def for_rows(self, x: torch.Tensor, transformer_options: dict) -> "Step":
        """For latents x (b, c, h, w) that ComfyUI has put together of several conditions. It shares `visited`."""
        if not self.areas:
            return self
        areas = [self.areas.get(uuid) for uuid in transformer_options.get("uuids") or [None]]
        return replace(self, active=tuple(active.for_rows(areas, x.shape) for active in self.active))


class Steps(Protocol):
    """What `transformer_options` has under KEY: the `step` that evaluations are part of at the moment, if any."""

    step: Step | None

    def unasked(self) -> None:
        """Called for an evaluation outside of any step, which is the base's own then. It may raise."""


@dataclass(frozen=True)
class OneStep:
    """`Steps` of training, where all evaluations belong to one."""

    step: Step

    def unasked(self) -> None:
        pass


class Broken(Exception):
    """torch.compile did not make one graph of the model with its adapters.

    Inside a broken graph the guards on a block's name and on its patches are dropped: code compiled for one block runs
    for others, and code compiled with adapters for the model without them. Whole graphs are right.
    """


def _graph_breaks() -> int:
    from torch._dynamo.utils import counters  # slow to import, but loaded where anything is compiled

    return sum(counters["graph_break"].values())


def is_compiled(transformer_options: dict) -> bool:
    return bool(transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(_COMPILE))


def without_compile(transformer_options: dict) -> dict:
    """A copy of `transformer_options` with which the model runs as it is."""
    wrappers = transformer_options["wrappers"]
    kept = {key: value for key, value in wrappers[WrappersMP.APPLY_MODEL].items() if key != _COMPILE}
    return {**transformer_options, "wrappers": {**wrappers, WrappersMP.APPLY_MODEL: kept}}


def take_part(transformer_options: dict, step: Step) -> dict:
    """A copy of `transformer_options` with which the hooks carry out `step`."""
    return {**transformer_options, KEY: OneStep(step)}


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    """APPLY_MODEL wrapper. The step becomes an argument of the diffusion model.

    ComfyUI's compile node drops every guard on `transformer_options`: a graph compiled without adapters, or with
    others, would run on. On an argument of its own the guards stay.
    """
    steps: Steps | None = transformer_options.get(KEY)
    if steps is None or steps.step is None:
        if steps is not None:
            steps.unasked()
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    compiled = is_compiled(transformer_options)
    before = _graph_breaks() if compiled else 0
    step = steps.step.for_rows(x, transformer_options)
    step.visited.clear()
    if step.works_inside:
        # Not from what patches are told: blocks of other packs tell them less.
        blocks = transformers(executor.class_obj.diffusion_model)
        attentions = {name: blocks[name].attn2 for name in step.sites()}
        step.attentions.update({name: (attn.heads, attn.attn_precision) for name, attn in attentions.items()})
    for share in (share for active in step.active for share in active.negatives):
        if not share.negative.keys_values:
            share.negative.compute_keys_values(executor.class_obj, x.device)
    denoised = executor(x, t, c_concat, c_crossattn, control, transformer_options, **{**kwargs, KEY: step})
    if compiled and (step.visited != step.sites() or _graph_breaks() > before):
        raise Broken
    return denoised


def diffusion_model(executor, x, timesteps, context=None, y=None, control=None, transformer_options={}, **kwargs):
    """DIFFUSION_MODEL wrapper: x (b, c, h, w), timesteps (b,), context (b, m, d)."""
    step = kwargs.pop(KEY, None)
    if step is not None:
        prepared = [
            (a.adapter, a.adapter.prepare(a.omega, timesteps, context, dtype=x.dtype, strength=a.strength))
            for a in step.active
        ]
        transformer_options = {**_with_our_patches(transformer_options), PREPARED: (step, prepared)}
        if step.works_inside:
            transformer_options = _with_guided_attention(transformer_options, step.attentions)
        if step.changes_linears:
            with adapted_linears(transformers(executor.class_obj), prepared):
                return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def _with_our_patches(transformer_options: dict) -> dict:
    """A copy in which ours are the last before the attentions and the first after them."""
    patches = transformer_options.get("patches", {})
    before, after = ([*patches.get(name, ())] for name in ("attn2_patch", "attn2_output_patch"))
    ours = {"attn2_patch": [*before, remember_input], "attn2_output_patch": [add_residual, *after]}
    return {**transformer_options, "patches": {**patches, **ours}}


def _with_guided_attention(transformer_options: dict, attentions: dict[str, tuple]) -> dict:
    """A copy in which `guided_attention` is around each site's attention, another node's replacement included."""
    replacements = transformer_options.get("patches_replace", {})
    before = replacements.get("attn2", {})
    ours = {}
    for name, (heads, precision) in attentions.items():
        place = block_of(name)
        base = functools.partial(_base_attention, heads=heads, precision=precision)
        attend = before.get(place, before.get(place[:2], base))  # as ComfyUI looks them up
        ours[place] = functools.partial(guided_attention, name=name, attend=attend)
    return {**transformer_options, "patches_replace": {**replacements, "attn2": {**before, **ours}}}


def _base_attention(q, k, v, extra_options, *, heads: int, precision):
    return comfy.ldm.modules.attention.optimized_attention(
        q, k, v, heads, attn_precision=precision, transformer_options=extra_options
    )


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
        if adapter.place == "attention":
            parts = [
                share.weigh(attended - attend(q, *share.negative.keys_values_at(name, len(q)), unconditional))
                for share in active.negatives
            ]
            out = adapter.guide(name, out, sum(parts[1:], parts[0]), h, shared)
    return out


@contextmanager
def adapted_linears(blocks: dict[str, nn.Module], prepared: list[tuple[Adapter, Prepared]]) -> Iterator[None]:
    """Inside, adapters of low rank add to what linear layers of `blocks`, transformer blocks by site name, return."""
    hooks = []
    try:
        for adapter, shared in prepared:
            sites = adapter.config.sites if adapter.config.changes_linears else ()
            for site in [site for site in sites if site.name in blocks]:
                layers = linear_layers(blocks[site.name], site)
                for path in adapter.paths:
                    hook = functools.partial(adapt_linear, adapter=adapter, name=site.name, path=path, shared=shared)
                    hooks.append(layers[path].register_forward_hook(hook))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def adapt_linear(layer, inputs, out, *, adapter: Adapter, name: str, path: str, shared: Prepared):
    """A forward hook: the layer's input, and its output (b, n, out)."""
    return adapter.adapt(name, path, out, inputs[0], shared)


def _site(step: Step, extra_options: dict) -> str | None:
    """Which site a patch is called for. Blocks of other packs may not say; sites come in the order of evaluation."""
    if "block" in extra_options and "block_index" in extra_options:
        return site_name(extra_options["block"], extra_options["block_index"])
    sites, last = step.sites(), step.visited[-1:]
    following = sites[sites.index(last[0]) + 1 :] if last else sites
    return following[0] if following else None


def remember_input(n, context, value, extra_options):
    """attn2_patch: n (b, tokens, w) is what the attention is given, context (b, m, d)."""
    if PREPARED in extra_options:
        step, _ = extra_options[PREPARED]
        if (name := _site(step, extra_options)) in step.sites():
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
        if adapter.place == "output":
            out = adapter.add(name, out, h, context, shared)
    return out


def register(model: comfy.model_patcher.ModelPatcher) -> None:
    """Put the wrappers into `model`, which the caller has cloned, unless they are there."""
    if not model.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, diffusion_model)


def managed(
    info: AdapterInfo, state: dict[str, torch.Tensor], base: comfy.model_patcher.ModelPatcher, source: str
) -> comfy.model_patcher.ModelPatcher:
    """Weights as a ModelPatcher of its own, which ComfyUI counts, offloads and unloads, in `base`'s compute dtype.

    Raises `AdapterFileError` naming `source` where a weight is too large for that dtype.
    """
    dtype = base.model.manual_cast_dtype or base.model.get_dtype()
    state = {key: tensor.to(dtype, copy=True) for key, tensor in state.items()}  # copied: files may be mapped
    overflown = sorted(key for key, tensor in state.items() if not tensor.isfinite().all())
    if overflown:
        raise AdapterFileError(
            f"Weights of the adapter {source} are NaN or too large for {dtype}, in which this model computes "
            f"({', '.join(overflown[:8])}): run the model in bf16 or fp32, or train the adapter again."
        )
    adapter = Adapter(info.config, comfy.ops.manual_cast).requires_grad_(False)
    patcher = comfy.model_patcher.CoreModelPatcher(
        adapter, load_device=base.load_device, offload_device=comfy.model_management.unet_offload_device()
    )
    adapter.load_state_dict(state, assign=True)
    return patcher

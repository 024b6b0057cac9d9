"""The hooks that let adapters take part in a model's evaluations, for sampling and for training alike.

Three stateless hooks on a clone of the model; what an evaluation needs travels with it, as a `Step`:

1. An APPLY_MODEL wrapper computes keys and values of negative prompts and hands the step on to the diffusion model as
   an argument of its own.
2. A DIFFUSION_MODEL wrapper prepares the adapters: once per evaluation, what does not depend on the image. Where an
   adapter works inside the attention it replaces the attention, for this evaluation, by one around what was there.
3. attn2_patch and attn2_output_patch: remember a site's input, then add the site's residual to its output.

Adapters that change the blocks' linear layers do so through forward hooks on them, which are there for the time of one
evaluation only, see `adapted_linears`.

Without a step in `transformer_options` they pass everything through untouched.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from ..adapter import Adapter, Prepared
from ..checkpoint import AdapterFileError, AdapterInfo
from .sites import block_of, linear_layers, site_name, transformers

# Under this name ComfyUI keeps our wrappers and additional models, and transformer_options what the hooks pass on.
KEY = "agd"
PREPARED = "agd_prepared"
_INPUT = "agd_input"
_COMPILE = "torch.compile"  # ComfyUI's key of what its compile nodes register


@dataclass
class Negative:
    """A negative prompt. `context`: (r, m, d), for evaluations of r rows or of any multiple of that; `share`: its
    weight among the negatives of a step. `keys_values`: what the base's attentions make of it, by site, (r, m, w) each.
    """

    context: torch.Tensor
    share: float = 1.0
    keys_values: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    lasting: bool = False  # whether `keys_values` are those of the weights that every step has

    @torch.no_grad()
    def look_up(self, model, device: torch.device) -> None:
        """Ask the base's layers for `keys_values`, once; `model` is ComfyUI's BaseModel.

        Hooks on a condition change the weights for its evaluations alone.
        """
        plain = getattr(model.current_patcher, "current_hooks", None) is None
        if plain and self.lasting:
            return
        self.lasting = plain
        context = self.context.to(device, model.get_dtype_inference())
        for name, transformer in transformers(model.diffusion_model).items():
            self.keys_values[name] = transformer.attn2.to_k(context), transformer.attn2.to_v(context)

    def of(self, name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (rows, m, w) at a site."""
        return tuple(value.repeat(rows // len(value), 1, 1) for value in self.keys_values[name])


@dataclass(frozen=True)
class Active:
    """An adapter at work. Numbers are tensors, for torch.compile would take plain ones for constants.

    `omega`: (1,) or (b,), one per row; `strength`: (1,). `negatives`: for adapters that use them, else empty. `merged`:
    whether what it does to linear layers is in their weights, see `merging.py`.
    """

    adapter: Adapter
    omega: torch.Tensor
    strength: torch.Tensor
    negatives: tuple[Negative, ...] = ()
    merged: bool = False

    @property
    def changes_linears(self) -> bool:
        """Whether it works on the base's linear layers while they are evaluated."""
        return self.adapter.config.changes_linears and not self.merged


@dataclass
class Step:
    """What the hooks need in one step of sampling or training; `visited` lists the sites of the last evaluation."""

    active: tuple[Active, ...]
    visited: list[str] = field(default_factory=list)

    def sites(self) -> list[str]:
        """All sites in the order of evaluation."""
        return [site.name for site in self.active[0].adapter.config.sites]

    @property
    def changes_linears(self) -> bool:
        """Whether an adapter works on the base's linear layers, where torch.compile would not see it come and go."""
        return any(active.changes_linears for active in self.active)


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
    return {**transformer_options, KEY: step}


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    """APPLY_MODEL wrapper. The step becomes an argument of the diffusion model.

    ComfyUI's compile node drops every guard on `transformer_options`: a graph compiled without adapters, or with
    others, would run on. On an argument of its own the guards stay.
    """
    step = transformer_options.get(KEY)
    if step is None:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    compiled = is_compiled(transformer_options)
    before = _graph_breaks() if compiled else 0
    step.visited = []
    for negative in (negative for active in step.active for negative in active.negatives):
        negative.look_up(executor.class_obj, x.device)
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
        transformer_options = {**transformer_options, PREPARED: (step, prepared)}
        if any(active.adapter.place == "attention" for active in step.active):
            transformer_options = _with_guided_attention(transformer_options, step.sites())
        if step.changes_linears:
            with adapted_linears(transformers(executor.class_obj), prepared):
                return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


def _with_guided_attention(transformer_options: dict, sites: list[str]) -> dict:
    """A copy in which `guided_attention` is around each site's attention, another node's replacement included."""
    replacements = transformer_options.get("patches_replace", {})
    before = replacements.get("attn2", {})
    ours = {}
    for name in sites:
        place = block_of(name)
        attend = before.get(place, before.get(place[:2], _base_attention))  # as ComfyUI looks them up
        ours[place] = functools.partial(guided_attention, name=name, attend=attend)
    return {**transformer_options, "patches_replace": {**replacements, "attn2": {**before, **ours}}}


def _base_attention(q, k, v, extra_options):
    return comfy.ldm.modules.attention.optimized_attention(
        q, k, v, extra_options["n_heads"],
        attn_precision=extra_options["attn_precision"], transformer_options=extra_options,
    )  # fmt: skip


def guided_attention(q, k, v, extra_options, *, name: str, attend: Callable):
    """An attn2 replacement: q (b, tokens, w), k and v (b, m, w) -> what goes into `to_out`, (b, tokens, w)."""
    attended = out = attend(q, k, v, extra_options)
    step, prepared = extra_options[PREPARED]
    h, _ = extra_options[_INPUT]
    # Replacements such as IP-Adapter's then take what they have for the unconditional.
    unconditional = {**extra_options, "cond_or_uncond": [1] * len(extra_options["cond_or_uncond"])}
    for active, (adapter, shared) in zip(step.active, prepared, strict=True):
        if adapter.place == "attention":
            delta = attended
            for negative in active.negatives:
                delta = delta - negative.share * attend(q, *negative.of(name, len(q)), unconditional)
            out = adapter.guide(name, out, delta, h, shared)
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


def remember_input(n, context, value, extra_options):
    """attn2_patch: n (b, tokens, w) is norm2's output, context (b, m, d)."""
    if PREPARED in extra_options:
        # A dict of this block's evaluation alone: nothing outlives it.
        extra_options[_INPUT] = (n, context)
    return n, context, value


def add_residual(out, extra_options):
    """attn2_output_patch: out (b, tokens, w)."""
    remembered = extra_options.pop(_INPUT, None)
    if remembered is None:
        return out
    step, prepared = extra_options[PREPARED]
    name = site_name(extra_options["block"], extra_options["block_index"])
    step.visited.append(name)
    for adapter, shared in prepared:
        if adapter.place == "output":
            out = adapter.add(name, out, *remembered, shared)
    return out


def register(model: comfy.model_patcher.ModelPatcher) -> None:
    """Put the hooks into `model`, which the caller has cloned, unless they are there."""
    patches = model.model_options["transformer_options"].get("patches", {})
    if remember_input in patches.get("attn2_patch", []):
        return
    model.set_model_attn2_patch(remember_input)
    model.set_model_attn2_output_patch(add_residual)
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

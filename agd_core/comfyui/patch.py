"""The hooks that let adapters take part in a model's evaluations, for sampling and for training alike.

Three stateless hooks on a clone of the model; what an evaluation needs travels with it, as a `Step`:

1. An APPLY_MODEL wrapper hands the step on to the diffusion model as an argument of its own.
2. A DIFFUSION_MODEL wrapper prepares the adapters: once per evaluation, what does not depend on the image.
3. attn2_patch and attn2_output_patch: remember a site's input, then add the site's residual to its output.

Without a step in `transformer_options` they pass everything through untouched.
"""

from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP

from ..adapter import Adapter
from ..checkpoint import AdapterFileError, AdapterInfo
from .sites import site_name

# Under this name ComfyUI keeps our wrappers and additional models, and transformer_options what the hooks pass on.
KEY = "agd"
PREPARED = "agd_prepared"
_INPUT = "agd_input"
_COMPILE = "torch.compile"  # ComfyUI's key of what its compile nodes register


@dataclass(frozen=True)
class Active:
    """An adapter at work. Numbers are tensors, for torch.compile would take plain ones for constants.

    `omega`: (1,) or (b,), one per row; `strength`: (1,).
    """

    adapter: Adapter
    omega: torch.Tensor
    strength: torch.Tensor


@dataclass
class Step:
    """What the hooks need in one step of sampling or training; `visited` lists the sites of the last evaluation."""

    active: tuple[Active, ...]
    visited: list[str] = field(default_factory=list)

    def sites(self) -> list[str]:
        """All sites in the order of evaluation."""
        return [site.name for site in self.active[0].adapter.config.sites]


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
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)


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

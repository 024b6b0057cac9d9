"""Putting an adapter into a ModelPatcher, for sampling and for training alike.

Three hooks, all registered on a clone and none of them global:

1. PREDICT_NOISE wrapper (sampling only): takes omega from the guider's cfg, sets cfg to 1 for the call, so that
   ComfyUI leaves out the unconditional, and switches the adapter on for this step through `transformer_options`.
2. DIFFUSION_MODEL wrapper: encodes (omega, t) once per evaluation.
3. attn2_patch and attn2_output_patch: remember a site's input, then add the site's residual to its output.

With nothing in `transformer_options[key]` the last two pass everything through untouched.
"""

import logging
import math
import uuid
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP

from ..adapter import Adapter
from ..checkpoint import AdapterInfo, check_base, load_state
from .sites import describe_base, site_name

log = logging.getLogger(__name__)


class AdapterPatch:
    """The hooks of one adapter. `adapter` may be ComfyUI-managed (sampling) or plain torch (training)."""

    def __init__(self, adapter: Adapter, strength: float = 1.0):
        self.adapter = adapter
        self.strength = strength
        self.key = f"agd_{uuid.uuid4().hex}"  # two adapters on one model keep apart

    def switch_on(self, transformer_options: dict, omega: torch.Tensor) -> dict:
        """A copy of `transformer_options` in which the adapter is active with omega (1,) or (b,)."""
        return {**transformer_options, self.key: omega}

    def diffusion_model(self, executor, x, timesteps, context, y=None, control=None, transformer_options={}, **kwargs):
        """DIFFUSION_MODEL wrapper: x (b, c, h, w), timesteps (b,), context (b, m, d)."""
        omega = transformer_options.get(self.key)
        if omega is not None:
            guidance = self.adapter.encode(omega, timesteps, dtype=x.dtype, strength=self.strength)
            transformer_options = {**transformer_options, self.key: guidance}
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def remember_input(self, n, context, value, extra_options):
        """attn2_patch: n (b, tokens, w) is norm2's output, context (b, m, d)."""
        if self.key in extra_options:
            # A dict of this block's evaluation alone: nothing outlives it.
            extra_options[f"{self.key}_input"] = (n, context)
        return n, context, value

    def add_residual(self, out, extra_options):
        """attn2_output_patch: out (b, tokens, w)."""
        remembered = extra_options.pop(f"{self.key}_input", None)
        if remembered is None:
            return out
        name = site_name(extra_options["block"], extra_options["block_index"])
        return out + self.adapter.residual(name, *remembered, extra_options[self.key])

    def register(self, model: comfy.model_patcher.ModelPatcher) -> None:
        """Add everything but the PREDICT_NOISE wrapper to `model`, which the caller has cloned."""
        model.set_model_attn2_patch(self.remember_input)
        model.set_model_attn2_output_patch(self.add_residual)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, self.key, self.diffusion_model)


@dataclass
class OmegaFromGuider:
    """PREDICT_NOISE wrapper: which omega a step gets, and whether the adapter takes part in it at all."""

    patch: AdapterPatch
    guidance_scale: float | None
    sigma_start: float
    sigma_end: float
    omega_range: tuple[float, float]
    warned: bool = False

    def __call__(self, executor, x, timestep, model_options={}, seed=None):
        guider = executor.class_obj
        if not self._in_range(timestep):
            return executor(x, timestep, model_options, seed)
        omega = guider.cfg if self.guidance_scale is None else self.guidance_scale
        if not math.isclose(omega, 1.0):
            self._warn_once(omega)
            options = model_options.get("transformer_options", {})
            on = self.patch.switch_on(options, torch.tensor([omega], device=x.device, dtype=torch.float32))
            model_options = {**model_options, "transformer_options": on}
        saved, guider.cfg = guider.cfg, 1.0
        try:
            return executor(x, timestep, model_options, seed)
        finally:
            guider.cfg = saved

    def _in_range(self, timestep: torch.Tensor) -> bool:
        if self.sigma_start == math.inf and self.sigma_end == 0.0:
            return True  # the usual case, without reading a value back from the device
        return self.sigma_end <= float(timestep.flatten()[0]) <= self.sigma_start

    def _warn_once(self, omega: float) -> None:
        low, high = self.omega_range
        if not self.warned and not low <= omega <= high:
            log.warning("AGD: guidance %g lies outside the adapter's trained range, %g to %g.", omega, low, high)
            self.warned = True


def load_managed(path: str) -> tuple[AdapterInfo, comfy.model_patcher.ModelPatcher]:
    """An adapter file as a ModelPatcher of its own, which ComfyUI counts, offloads and unloads."""
    info, state = load_state(path)
    return info, managed(info, state)


def managed(info: AdapterInfo, state: dict[str, torch.Tensor]) -> comfy.model_patcher.ModelPatcher:
    """Weights as a ModelPatcher of `comfy.ops` layers, which cast to the base's compute dtype as they run."""
    adapter = Adapter(info.config, comfy.ops.manual_cast).requires_grad_(False)
    patcher = comfy.model_patcher.CoreModelPatcher(
        adapter,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    adapter.load_state_dict(state, assign=patcher.is_dynamic())
    return patcher


def apply_adapter(
    model: comfy.model_patcher.ModelPatcher,
    info: AdapterInfo,
    adapter: comfy.model_patcher.ModelPatcher,
    *,
    source: str,
    guidance_scale: float | None = None,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` that samples with guidance embedded, one evaluation per step.

    `guidance_scale` None takes omega from the guider's cfg. At strength 0, and for steps outside
    [start_percent, end_percent], the model runs as if there were no adapter. Raises `AdapterFileError` where the
    adapter was made for another base; `source` names it there.
    """
    check_base(info, describe_base(model.model), source)
    clone = model.clone()
    if strength == 0 or start_percent >= end_percent:
        return clone
    sampling = model.get_model_object("model_sampling")
    patch = AdapterPatch(adapter.model, strength)
    patch.register(clone)
    wrapper = OmegaFromGuider(
        patch,
        guidance_scale,
        sigma_start=math.inf if start_percent <= 0 else float(sampling.percent_to_sigma(start_percent)),
        sigma_end=0.0 if end_percent >= 1 else float(sampling.percent_to_sigma(end_percent)),
        omega_range=info.omega_range,
    )
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, patch.key, wrapper)
    clone.set_additional_models(patch.key, [adapter])
    return clone

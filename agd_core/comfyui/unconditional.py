"""Who needs the unconditional prediction itself, so that a step takes two evaluations whatever an adapter does.

Some say so before anything is evaluated (`who_combines`). A post-CFG function is given both predictions whether it
wants them or not; that one needs the unconditional is seen when it uses it (`tell_use`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.samplers import Sampler

# The model option for a function that evaluates both conditions in ComfyUI's place.
EVALUATES_BOTH = "sampler_calc_cond_batch_function"
POST_CFG = "sampler_post_cfg_function"
PRE_CFG = "sampler_pre_cfg_function"
_OURS = __name__.rpartition(".")[0]


def _is_ours(function: Callable) -> bool:
    return getattr(function, "__module__", "").rpartition(".")[0] == _OURS


def name_of(function: Callable, sampler: Sampler | None) -> str:
    """The node or sampler that made `function`: RescaleCFG.patch.<locals>.rescale_cfg -> RescaleCFG."""
    function = getattr(function, "watched", function)
    sample = getattr(sampler, "sampler_function", None)
    # Samplers share code (euler_cfg_pp is euler_ancestral_cfg_pp), so only the one in use has the name that was chosen.
    if sample is not None and getattr(function, "__module__", None) == sample.__module__:
        return f"the sampler {sample.__name__.removeprefix('sample_')}"
    return getattr(function, "__qualname__", type(function).__qualname__).split(".")[0]


def _patches(model_options: dict) -> list[Callable]:
    patches = model_options.get("transformer_options", {}).get("patches", {})
    return [patch for group in patches.values() for patch in group if not _is_ours(patch)]


def who_combines(sampler: Sampler, model_options: dict) -> str | None:
    """The name of what says that it works on both predictions, or None.

    Functions in place of cfg's combination, before it, or in place of the evaluation; and whatever asks for the
    unconditional even at cfg 1, as the `*_cfg_pp` samplers and nodes that compare both inside the attention do.
    """
    makers = [fn for fn in model_options.get(PRE_CFG, []) if not _is_ours(fn)]
    makers += [model_options[key] for key in ("sampler_cfg_function", EVALUATES_BOTH) if key in model_options]
    if model_options.get("disable_cfg1_optimization", False):
        # The flag does not say who set it: one of these functions, or else a node with an attention patch.
        makers = makers + list(model_options.get(POST_CFG, [])) or _patches(model_options)
        return " or ".join(dict.fromkeys(name_of(maker, sampler) for maker in makers)) or "a node of this workflow"
    return " and ".join(dict.fromkeys(name_of(maker, sampler) for maker in makers)) or None


_SHAPE = {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
}  # fmt: skip


class _Telling(torch.Tensor):
    """A tensor that calls `use` when its values are asked for; what it looks like may be asked."""

    use: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _SHAPE:
            for value in (*args, *kwargs.values()):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, cls):
                        tensor.use()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


@dataclass(frozen=True)
class _Watched:
    """Another node's post-CFG function. `use` is called when it uses the unconditional prediction, then or later."""

    watched: Callable
    use: Callable[[Callable], None]

    def __call__(self, args: dict) -> torch.Tensor:
        unconditional = args["uncond_denoised"].as_subclass(_Telling)
        unconditional.use = lambda: self.use(self.watched)
        return self.watched({**args, "uncond_denoised": unconditional})


def tell_use(model_options: dict, use: Callable[[Callable], None]) -> None:
    """Have `use` called with whichever of the post-CFG functions uses the unconditional prediction.

    `model_options` are one sampling's own; a sampler's functions are found there from its first step on.
    """
    forget_use(model_options)
    functions = model_options.get(POST_CFG, [])
    functions[:] = [_Watched(function, use) for function in functions]


def forget_use(model_options: dict) -> None:
    functions = model_options.get(POST_CFG, [])
    functions[:] = [getattr(function, "watched", function) for function in functions]

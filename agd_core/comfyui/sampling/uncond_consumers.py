"""Which nodes and samplers need the unconditional prediction itself, so that a step takes two evaluations.

Found before anything is evaluated, by what they put into the model options. `post_cfg_watch.py` finds those that only
show it when they use the prediction.
"""

import functools
from collections.abc import Callable, Iterable

from comfy.samplers import Sampler

from .post_cfg_watch import post_cfg_functions

# The model option for a function that evaluates both conditions in ComfyUI's place.
EVALUATES_BOTH = "sampler_calc_cond_batch_function"
PRE_CFG = "sampler_pre_cfg_function"
_OURS = __name__.rpartition(".sampling.")[0]  # agd_core.comfyui


def find_uncond_consumer(sampler: Sampler, model_options: dict) -> str | None:
    """The name of a node or sampler that declares that it works on both predictions, or None.

    Functions in place of cfg's combination, before it, or in place of the evaluation; and whatever asks for the
    unconditional even at cfg 1, as the `*_cfg_pp` samplers and nodes that compare both inside the attention do.
    """
    makers = [fn for fn in model_options.get(PRE_CFG, []) if not _is_ours(fn)]
    makers += [model_options[key] for key in ("sampler_cfg_function", EVALUATES_BOTH) if key in model_options]
    if wants_uncond_at_cfg_1(model_options):
        return name_uncond_requester(makers + post_cfg_functions(model_options), sampler, model_options)
    return " and ".join(dict.fromkeys(node_name(maker, sampler) for maker in makers)) or None


def wants_uncond_at_cfg_1(model_options: dict) -> bool:
    """Whether a node or sampler wants the unconditional prediction even at cfg 1."""
    return model_options.get("disable_cfg1_optimization", False)


def name_uncond_requester(makers: list[Callable], sampler: Sampler, model_options: dict) -> str:
    """That option does not say who set it: one of these functions' makers, or else a node with an attention patch."""
    return node_names(makers or _attention_patches(model_options), sampler) or "a node of this workflow"


def node_name(function: Callable, sampler: Sampler | None) -> str:
    """The node or sampler that made `function`: RescaleCFG.patch.<locals>.rescale_cfg -> RescaleCFG."""
    while isinstance(function, functools.partial):
        function = function.func
    sample = getattr(sampler, "sampler_function", None)
    # Samplers share code (euler_cfg_pp is euler_ancestral_cfg_pp), so only the one in use has the name that was chosen.
    if sample is not None and getattr(function, "__module__", None) == sample.__module__:
        return f"the sampler {sample.__name__.removeprefix('sample_')}"
    return getattr(function, "__qualname__", type(function).__qualname__).split(".")[0]


def node_names(functions: Iterable[Callable], sampler: Sampler | None) -> str:
    """The nodes that made them, for a message; empty for none."""
    return " or ".join(dict.fromkeys(node_name(function, sampler) for function in functions))


def _attention_patches(model_options: dict) -> list[Callable]:
    """Those of other nodes."""
    patches = model_options.get("transformer_options", {}).get("patches", {})
    return [patch for group in patches.values() for patch in group if not _is_ours(patch)]


def _is_ours(function: Callable) -> bool:
    return getattr(function, "__module__", "").startswith(f"{_OURS}.")

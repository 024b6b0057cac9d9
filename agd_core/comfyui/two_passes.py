"""Who needs the unconditional prediction too, so that a step takes two passes whatever an adapter does."""

from collections.abc import Callable
from types import CodeType

from comfy.samplers import CFGGuider, Sampler

# The model option for a function that evaluates both conditions in ComfyUI's place.
EVALUATES_BOTH = "sampler_calc_cond_batch_function"


def _reads(code: CodeType, text: str) -> bool:
    """Whether a string constant of the function, or of one inside it, contains `text`."""
    constants = code.co_consts
    return any(isinstance(c, str) and text in c for c in constants) or any(
        _reads(c, text) for c in constants if isinstance(c, CodeType)
    )


def _needs_unconditional(post_cfg: Callable) -> bool:
    # A post-CFG function is given both predictions, whether it wants them or not; most adjust the result alone.
    code = getattr(getattr(post_cfg, "__func__", post_cfg), "__code__", None)
    return code is not None and _reads(code, "uncond")


def _name(function: Callable, sampler: Sampler) -> str:
    """The node or sampler that made `function`: RescaleCFG.patch.<locals>.rescale_cfg -> RescaleCFG."""
    sample = getattr(sampler, "sampler_function", None)
    # Samplers share code (euler_cfg_pp is euler_ancestral_cfg_pp), so only the one in use has the name that was chosen.
    if sample is not None and getattr(function, "__module__", None) == sample.__module__:
        return f"the sampler {sample.__name__.removeprefix('sample_')}"
    return getattr(function, "__qualname__", type(function).__qualname__).split(".")[0]


def _patches(model_options: dict) -> list[Callable]:
    patches = model_options.get("transformer_options", {}).get("patches", {})
    ours = __name__.rpartition(".")[0]
    return [p for group in patches.values() for p in group if getattr(p, "__module__", "").rpartition(".")[0] != ours]


def _guider_of_its_own(guider: CFGGuider) -> str | None:
    """The name of a guider that combines predictions in its own way, or None."""
    return None if type(guider).predict_noise is CFGGuider.predict_noise else f"the guider {type(guider).__name__}"


def who_needs_both(guider: CFGGuider, sampler: Sampler, model_options: dict) -> str | None:
    """The name of what needs both predictions in this step, or None if one is enough.

    Guiders that combine predictions in their own way, nodes that replace or precede cfg's combination, samplers and
    nodes that ask for the unconditional even at cfg 1.
    """
    if name := _guider_of_its_own(guider):
        return name
    if guider.conds.get("negative") is None:
        return None  # as with BasicGuider: there is nothing for a second pass
    before = list(model_options.get("sampler_pre_cfg_function", []))
    for key in ("sampler_cfg_function", EVALUATES_BOTH):
        before += [model_options[key]] if key in model_options else []
    after = [fn for fn in model_options.get("sampler_post_cfg_function", []) if _needs_unconditional(fn)]
    if model_options.get("disable_cfg1_optimization", False):
        # The flag does not say who set it: one of these functions, or else a node with an attention patch.
        makers = before + after or _patches(model_options)
        return " or ".join(dict.fromkeys(_name(maker, sampler) for maker in makers)) or "a node of this workflow"
    return " and ".join(dict.fromkeys(_name(maker, sampler) for maker in before + after)) or None


def who_needs_both_evaluated(guider: CFGGuider, sampler: Sampler, model_options: dict) -> str | None:
    """The name of what needs both predictions evaluated in this very step, or None if one may be estimated.

    Beside guiders and nodes that evaluate them in their own way: samplers that step along the unconditional
    prediction, and nodes that note what attentions do in its evaluation.
    """
    if name := _guider_of_its_own(guider):
        return name
    sample = getattr(sampler, "sampler_function", None)
    if EVALUATES_BOTH in model_options:
        return _name(model_options[EVALUATES_BOTH], sampler)
    replacements = model_options.get("transformer_options", {}).get("patches_replace", {})
    inside = {getattr(fn, "__module__", None) for group in replacements.values() for fn in group.values()}
    for function in filter(_needs_unconditional, model_options.get("sampler_post_cfg_function", [])):
        if getattr(function, "__module__", None) in inside | {getattr(sample, "__module__", None)}:
            return _name(function, sampler)
    return None

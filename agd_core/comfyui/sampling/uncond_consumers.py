"""Who needs the unconditional prediction itself, so that a step takes two evaluations whatever an adapter does.

Some say so before anything is evaluated (`who_combines`). A post-CFG function is given both predictions whether it
wants them or not; that one needs the unconditional, or what guidance has added, is seen when it uses it (`watch_use`).
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from comfy.samplers import Sampler

from .steps import Itself

# The model option for a function that evaluates both conditions in ComfyUI's place.
EVALUATES_BOTH = "sampler_calc_cond_batch_function"
POST_CFG = "sampler_post_cfg_function"
PRE_CFG = "sampler_pre_cfg_function"
_OURS = __name__.rpartition(".sampling.")[0]  # agd_core.comfyui


def _is_ours(function: Callable) -> bool:
    return getattr(function, "__module__", "").startswith(f"{_OURS}.")


def name_of(function: Callable, sampler: Sampler | None) -> str:
    """The node or sampler that made `function`: RescaleCFG.patch.<locals>.rescale_cfg -> RescaleCFG."""
    sample = getattr(sampler, "sampler_function", None)
    # Samplers share code (euler_cfg_pp is euler_ancestral_cfg_pp), so only the one in use has the name that was chosen.
    if sample is not None and getattr(function, "__module__", None) == sample.__module__:
        return f"the sampler {sample.__name__.removeprefix('sample_')}"
    return getattr(function, "__qualname__", type(function).__qualname__).split(".")[0]


def _patches(model_options: dict) -> list[Callable]:
    patches = model_options.get("transformer_options", {}).get("patches", {})
    return [patch for group in patches.values() for patch in group if not _is_ours(patch)]


def asks_for_both(model_options: dict) -> bool:
    """Whether something wants the unconditional even at cfg 1."""
    return model_options.get("disable_cfg1_optimization", False)


def who_asks_for_both(makers: list[Callable], sampler: Sampler, model_options: dict) -> str:
    """The flag does not say who set it: one of these functions' makers, or else a node with an attention patch."""
    return names_of(makers or _patches(model_options), sampler) or "a node of this workflow"


def who_combines(sampler: Sampler, model_options: dict) -> str | None:
    """The name of what says that it works on both predictions, or None.

    Functions in place of cfg's combination, before it, or in place of the evaluation; and whatever asks for the
    unconditional even at cfg 1, as the `*_cfg_pp` samplers and nodes that compare both inside the attention do.
    """
    makers = [fn for fn in model_options.get(PRE_CFG, []) if not _is_ours(fn)]
    makers += [model_options[key] for key in ("sampler_cfg_function", EVALUATES_BOTH) if key in model_options]
    if asks_for_both(model_options):
        return who_asks_for_both(makers + post_cfg(model_options), sampler, model_options)
    return " and ".join(dict.fromkeys(name_of(maker, sampler) for maker in makers)) or None


_SHAPE = {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
}  # fmt: skip
_DIFFERENCES = {torch.sub, torch.subtract, torch.rsub, torch.Tensor.sub, torch.Tensor.subtract, torch.Tensor.__sub__}
_DIFFERENCES |= {torch.Tensor.__rsub__, torch.Tensor.sub_, torch.Tensor.__isub__}


class _Given(torch.Tensor):
    """A prediction as it is given to another node's function: that of a `role` in `given`, which is told of its use.

    What it looks like may be asked. When the function has returned, it is a tensor like others.
    """

    given: "Given | None" = None
    role: str = ""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _SHAPE:
            flat = [t for v in (*args, *kwargs.values()) for t in (v if isinstance(v, (list, tuple)) else (v,))]
            own = [tensor for tensor in flat if isinstance(tensor, cls) and tensor.given is not None]
            roles = {tensor.role for tensor in own}
            for tensor in own:
                tensor.given.used.add(tensor.role)
            added = func in _DIFFERENCES and roles == {"denoised", "cond_denoised"}
            if own and (added or "uncond_denoised" in roles):
                own[0].given.use()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


@dataclass
class Given:
    """The predictions that one call of another node's `function` was given; `args`: ComfyUI's; `used`: their roles."""

    function: Callable
    args: dict
    on_use: Callable[["Given"], None]
    used: set[str] = field(default_factory=set)

    def use(self) -> None:
        self.on_use(self)

    def __call__(self) -> torch.Tensor:
        own = {role: self.args[role].as_subclass(_Given) for role in ("denoised", "cond_denoised", "uncond_denoised")}
        for role in own:
            own[role].given, own[role].role = self, role
        try:
            result = self.function({**self.args, **own})
            # Who keeps the unconditional uses it later.
            if result is own["uncond_denoised"] or sys.getrefcount(own["uncond_denoised"]) > _UNKEPT:
                self.use()
        finally:
            for role in own:
                own[role].given = None
        return result.as_subclass(torch.Tensor)


_UNKEPT = 2  # references: the dictionary's above and the one that is counted with


@dataclass(frozen=True)
class _Watched(Itself):
    """Another node's post-CFG function; `on_use` is called when it uses what only CFG has, `after` when it is over."""

    watched: Callable
    on_use: Callable[[Given], None]
    after: Callable[[Given], None] | None

    def __call__(self, args: dict) -> torch.Tensor:
        given = Given(self.watched, args, self.on_use)
        result = given()
        if self.after is not None:
            self.after(given)
        return result


def watch_use(model_options: dict, on_use: Callable[[Given], None], after: Callable | None = None) -> None:
    """Have `on_use` called when a post-CFG function uses the unconditional prediction, or what guidance has added.
    `after` is called with its `Given` whenever one has returned.

    `model_options` are one sampling's own; a sampler's functions are found there from its first step on.
    """
    if model_options.get(POST_CFG):
        model_options[POST_CFG] = [_Watched(function, on_use, after) for function in post_cfg(model_options)]


def unwatch(model_options: dict) -> None:
    if model_options.get(POST_CFG):
        model_options[POST_CFG] = post_cfg(model_options)


def post_cfg(model_options: dict) -> list[Callable]:
    """The post-CFG functions of other nodes."""
    return [getattr(function, "watched", function) for function in model_options.get(POST_CFG, ())]


def names_of(functions: Iterable[Callable], sampler: Sampler | None) -> str:
    """The nodes that made them, for a message; empty for none."""
    return " or ".join(dict.fromkeys(name_of(function, sampler) for function in functions))

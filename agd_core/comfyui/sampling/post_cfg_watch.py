"""Whether a post-CFG function of another node uses the unconditional prediction, or what guidance has added.

ComfyUI gives such a function both predictions whether it wants them or not, so the tensors that it is given report
their use. Reading their shapes is not a use.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .shared_by_deepcopy import SharedByDeepcopy

POST_CFG = "sampler_post_cfg_function"
_PREDICTIONS = ("denoised", "cond_denoised", "uncond_denoised")  # ComfyUI's names of a function's arguments

_SHAPE = {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__, torch.Tensor.is_floating_point,
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
}  # fmt: skip
_DIFFERENCES = {torch.sub, torch.subtract, torch.rsub, torch.Tensor.sub, torch.Tensor.subtract, torch.Tensor.__sub__}
_DIFFERENCES |= {torch.Tensor.__rsub__, torch.Tensor.sub_, torch.Tensor.__isub__}


class _WatchedPrediction(torch.Tensor):
    """A prediction while another node's function has it: its use is reported to `call`; `role`: ComfyUI's name of it.

    When the function has returned, it is a tensor like others.
    """

    call: "PostCfgCall | None" = None
    role: str = ""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _SHAPE:
            flat = [t for v in (*args, *kwargs.values()) for t in (v if isinstance(v, (list, tuple)) else (v,))]
            own = [(t.call, t.role) for t in flat if isinstance(t, cls) and t.call is not None]
            roles = {role for _, role in own}
            for call, role in own:
                call.used.add(role)
            added = func in _DIFFERENCES and roles == {"denoised", "cond_denoised"}
            if own and (added or "uncond_denoised" in roles):
                own[0][0].report_use()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


@dataclass
class PostCfgCall:
    """One call of another node's `function`; `args`: ComfyUI's; `used`: the roles of predictions that it has used."""

    function: Callable
    args: dict
    on_use: Callable[["PostCfgCall"], None]
    used: set[str] = field(default_factory=set)

    def report_use(self) -> None:
        self.on_use(self)

    def run(self) -> torch.Tensor:
        own = {role: self.args[role].as_subclass(_WatchedPrediction) for role in _PREDICTIONS}
        for role in own:
            own[role].call, own[role].role = self, role
        try:
            result = self.function({**self.args, **own})
            # A function that keeps the unconditional prediction uses it later.
            if result is own["uncond_denoised"] or sys.getrefcount(own["uncond_denoised"]) > _REFERENCES_UNLESS_KEPT:
                self.report_use()
        finally:
            for role in own:
                own[role].call = None
        return result.as_subclass(torch.Tensor)


_REFERENCES_UNLESS_KEPT = 2  # the dictionary's above and the one that is counted with


@dataclass(frozen=True)
class _WatchedFunction(SharedByDeepcopy):
    """A post-CFG function in another node's place: calls that node's `function`, see `watch_post_cfg`."""

    function: Callable
    on_use: Callable[[PostCfgCall], None]
    on_return: Callable[[PostCfgCall], None] | None

    def __call__(self, args: dict) -> torch.Tensor:
        call = PostCfgCall(self.function, args, self.on_use)
        result = call.run()
        if self.on_return is not None:
            self.on_return(call)
        return result


def watch_post_cfg(
    model_options: dict,
    on_use: Callable[[PostCfgCall], None],
    on_return: Callable[[PostCfgCall], None] | None = None,
) -> None:
    """Have `on_use` called when a post-CFG function uses the unconditional prediction, or what guidance has added, and
    `on_return` whenever one has returned.

    `model_options` are one sampling's own; a sampler's functions are found there from its first step on.
    """
    if model_options.get(POST_CFG):
        functions = post_cfg_functions(model_options)
        model_options[POST_CFG] = [_WatchedFunction(function, on_use, on_return) for function in functions]


def unwatch_post_cfg(model_options: dict) -> None:
    if model_options.get(POST_CFG):
        model_options[POST_CFG] = post_cfg_functions(model_options)


def post_cfg_functions(model_options: dict) -> list[Callable]:
    """Those of other nodes, as they are."""
    own = model_options.get(POST_CFG, ())
    return [function.function if isinstance(function, _WatchedFunction) else function for function in own]

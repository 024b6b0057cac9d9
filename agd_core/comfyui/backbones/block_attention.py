"""Inside the attentions of a transformer's blocks: what they make of a prompt's tokens, kept and led away from.

Image tokens look at the prompt's among their own (joint attention, in one softmax) or apart from them
(cross-attention). A prompt's keys and values are kept from one evaluation of a strip of noise; in a guided evaluation
the image's queries look at them in place of the prompt's own,

    delta = A(q, [k_image, k_prompt]) - A(q, [k_image, k_negative])

with both prompts' kept alike, so that equal prompts give exactly zero; where they don't depend on the step, the
prompt's own are those of the evaluation. Attentions are reached through ComfyUI's
`optimized_attention_override`, which is put into the `transformer_options` of one block's run (or of its module's that
has the attention, `unhooked_attention.py`): each run counts its own calls, also when it is computed again in a backward
pass.

Shapes: b rows, n image tokens, m prompt tokens, w channels, as ComfyUI's attention functions take them: (b, n, w), or
(b, heads, n, w / heads) with `skip_reshape`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ...adapter import Adapter, Prepared
from ..fused_attention import fused
from ..guided_step import ActiveAdapter
from ..prompt import KeysValues, Prompt
from .module_hooks import hooked_before
from .split_attention import can_split, joined, look
from .unhooked_attention import HookedForward, hooked

if TYPE_CHECKING:
    from ..sampling.negatives import TokenGrid

OVERRIDE = "optimized_attention_override"
_OPTIONAL = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")

# (name of the adapter layer, another node's override or None) -> an override for one run of the layer's block.
OverrideFor = Callable[[str, Callable | None], Callable]


# In the transformer_options of an evaluation in which attentions are overridden: networks hand them on in many ways.
_OVERRIDE_FOR = "agd_attention"


def with_override(arguments: dict[str, Any], override: OverrideFor) -> dict[str, Any]:
    """A network's arguments, with which its blocks inside `overridden_attention` have an `override` each."""
    options = {**arguments["transformer_options"], _OVERRIDE_FOR: override}
    return {**arguments, "transformer_options": options}


def without_override(arguments: dict[str, Any]) -> tuple[dict[str, Any], OverrideFor | None]:
    """The inverse of `with_override`."""
    options = dict(arguments.get("transformer_options", {}))
    override = options.pop(_OVERRIDE_FOR, None)
    return {**arguments, "transformer_options": options}, override


@contextmanager
def overridden_attention(blocks: dict[str, nn.Module]) -> Iterator[None]:
    """Inside, the attentions of each block, by adapter layer, go through what `with_override` says."""

    def hook_of(name: str) -> Callable:
        def hook(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return tuple(own(value) for value in args), {key: own(value) for key, value in kwargs.items()}

        def own(value):
            if not (isinstance(value, dict) and _OVERRIDE_FOR in value):
                return value
            return {**value, OVERRIDE: value[_OVERRIDE_FOR](name, value.get(OVERRIDE))}

        return hook

    with ExitStack() as hooks:
        for name, block in blocks.items():
            hooks.enter_context(hooked_before(block, hook_of(name)))
        yield


@contextmanager
def overridden_unhooked(blocks: dict[str, nn.Module], path: str, override: OverrideFor) -> Iterator[None]:
    """As `overridden_attention`, of an attention that asks for no override by itself: of the module at `path` in each
    block."""
    forwards = [
        HookedForward(block.get_submodule(path), partial(_options, name, override)) for name, block in blocks.items()
    ]
    with hooked(forwards):
        yield


def _options(name: str, override: OverrideFor) -> dict:
    return {OVERRIDE: override(name, None)}


class AttentionCall:
    """One call of an attention function: `q`, `k`, `v` and what else it was given."""

    def __init__(self, attend: Callable, q, k, v, heads: int, args: tuple, kwargs: dict):
        self.attend, self.q, self.k, self.v, self.heads = attend, q, k, v, heads
        self.kwargs = {**kwargs, **dict(zip(_OPTIONAL, args, strict=False))}
        self.axis = 2 if self.kwargs.get("skip_reshape") else 1  # of the tokens

    @property
    def queries(self) -> int:
        return self.q.shape[self.axis]

    @property
    def keys(self) -> int:
        return self.k.shape[self.axis]

    @property
    def head_channels(self) -> int:
        return self.q.shape[3] if self.axis == 2 else self.q.shape[2] // self.heads

    def by_head(self, tokens: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values as (b, heads, n, d)."""
        if self.axis == 1:
            tokens = tokens.flatten(2).unflatten(2, (-1, self.head_channels)).transpose(1, 2)
        sharing = self.heads // tokens.shape[1]  # heads may share keys and values
        return tokens if sharing == 1 else tokens.repeat_interleave(sharing, dim=1)

    def goes_on(self, keys: int) -> bool:
        """Whether it is another part of the same attention as the call before, to so many keys.

        LTX-Video computes the attention of guiding frames apart from the others': each has a part of the queries.
        """
        return self.keys == keys and self.queries < keys

    def run(self) -> torch.Tensor:
        return self.attend(self.q, self.k, self.v, self.heads, **self.kwargs)

    def attended(self, out: torch.Tensor) -> torch.Tensor:
        """What `run` returned, as (b, queries, w)."""
        return out.transpose(1, 2).flatten(2) if self.kwargs.get("skip_output_reshape") else out

    def as_returned(self, attended: torch.Tensor) -> torch.Tensor:
        """The inverse of `attended`."""
        if not self.kwargs.get("skip_output_reshape"):
            return attended
        return attended.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def mask(self, queries: slice, keys: slice) -> torch.Tensor | None:
        """A part of the mask, (b or 1, heads or 1, queries or 1, keys)."""
        mask = self.kwargs.get("mask")
        if mask is None:
            return None
        while mask.ndim < 4:
            mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
        mask = mask.expand(*mask.shape[:3], self.keys)
        return mask[:, :, queries if mask.shape[2] > 1 else slice(None), keys]

    def with_keys(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The same attention of other queries to other keys and values: (b, queries, w)."""
        if mask is not None:
            mask = mask.expand(-1, -1, q.shape[self.axis], -1)
        kwargs = {**self.kwargs, "mask": mask, "skip_output_reshape": False}
        return self.attend(q, k, v, self.heads, **kwargs)


def _attending(before: Callable | None, function: Callable) -> Callable:
    if before is None:
        return function
    return lambda *args, **kwargs: before(function, *args, **kwargs)


@dataclass(frozen=True)
class Place:
    """Where the prompt's tokens are in an attention: `joint` with the image's, and then `last` or before them.

    `changes`: whether what it makes of them is another in every step.
    """

    joint: bool
    last: bool = False
    changes: bool = True

    def split(self, tokens: int, m: int) -> tuple[slice, slice]:
        """Those of the image and those of the prompt, m, of so many tokens."""
        first = tokens - m if self.last else m
        before, behind = slice(0, first), slice(first, tokens)
        return (before, behind) if self.last else (behind, before)


@dataclass
class KeepingAttention:
    """An override that keeps what one of a block's attentions makes of the prompt's tokens.

    `tokens` says how many those are. Of joint attentions it is the longest, of others the first that isn't the image's
    to itself, of which there may be as many keys.
    """

    before: Callable | None
    place: Place
    tokens: Callable[[], int]
    number: int = -1  # of the attention that the last call was of
    keys: int = 0
    longest: int = 0
    found: list[tuple[bool, KeysValues]] = field(default_factory=list)

    def __call__(self, function, q, k, v, heads, *args, **kwargs):
        call, m = AttentionCall(_attending(self.before, function), q, k, v, heads, args, kwargs), self.tokens()
        self.number, self.keys = self.number + (not call.goes_on(self.keys)), call.keys
        if self.place.joint and call.queries == call.keys > max(m, self.longest):
            self.longest, self.found = call.keys, [(True, self._of_prompt(call, m))]
        elif not self.place.joint and call.keys == m:
            self.found.append((call.queries != m, self._of_prompt(call, m)))
        return call.run()

    def _of_prompt(self, call: AttentionCall, m: int) -> KeysValues:
        image, prompt = self.place.split(call.keys, m) if self.place.joint else (slice(0, 1), slice(0, m))
        mask = call.mask(slice(image.start, image.start + 1), prompt)
        keys, values = (_part(each, call.axis, prompt).clone() for each in (call.k, call.v))
        return KeysValues(keys, values, mask, self.number)

    def keys_values(self) -> KeysValues | None:
        """None where no attention looks at the prompt."""
        sure = [kept for is_sure, kept in self.found if is_sure]
        return next(iter(sure or [kept for _, kept in self.found[1:]]), None)


def _part(tokens: torch.Tensor, axis: int, part: slice) -> torch.Tensor:
    return tokens.narrow(axis, part.start, part.stop - part.start)


def prompt_keys_values(prompts: list[Prompt], name: str, rows: int, axis: int) -> KeysValues:
    """Of the positive prompts at an adapter layer, in the order of the rows: of several, all as long as the longest.

    ComfyUI repeats shorter prompts that it evaluates together with longer ones, to a common multiple of their lengths.
    """
    each = [prompt.keys_values_at(name, rows // len(prompts)) for prompt in prompts]
    if len(each) == 1:
        return each[0]
    length = math.lcm(*(kept.keys.shape[axis] for kept in each))
    repeated = [_repeated(kept, length, axis) for kept in each]
    masks = [kept.mask for kept in repeated if kept.mask is not None]
    mask = torch.cat(masks) if len(masks) == len(repeated) else None
    keys, values = (torch.cat(parts) for parts in zip(*((kept.keys, kept.values) for kept in repeated), strict=True))
    return KeysValues(keys, values, mask, each[0].call)


def _repeated(kept: KeysValues, length: int, axis: int) -> KeysValues:
    times = length // kept.keys.shape[axis]
    if times == 1:
        return kept
    keys, values = (torch.cat([each] * times, dim=axis) for each in (kept.keys, kept.values))
    mask = None if kept.mask is None else torch.cat([kept.mask] * times, dim=-1)
    return KeysValues(keys, values, mask, kept.call)


@dataclass(frozen=True)
class GuidedAttentions:
    """The override of each block's run in an evaluation. `prompts`: the positive ones, in the order of the rows;
    `grid`: how the image's tokens lie."""

    place: Place
    active: tuple[ActiveAdapter, ...]
    prepared: list[tuple[Adapter, Prepared]]
    prompts: list[Prompt]
    grid: "TokenGrid"

    def __call__(self, name: str, before: Callable | None) -> "GuidedAttention":
        return GuidedAttention(self, name, before)


@dataclass
class GuidedAttention:
    """An override that adds what adapters have to say of both prompts to what the image's tokens get."""

    all: GuidedAttentions
    name: str
    before: Callable | None
    number: int = -1  # of the attention that the last call was of
    keys: int = 0

    def again(self) -> "GuidedAttention":
        """For another run of the block."""
        return GuidedAttention(self.all, self.name, self.before)

    def __call__(self, function, q, k, v, heads, *args, **kwargs):
        call = AttentionCall(_attending(self.before, function), q, k, v, heads, args, kwargs)
        self.number, self.keys = self.number + (not call.goes_on(self.keys)), call.keys
        kept, place = prompt_keys_values(self.all.prompts, self.name, len(q), call.axis), self.all.place
        if self.number != kept.call:
            return call.run()
        if place.joint and self.before in (None, fused) and can_split(q, call.head_channels):
            return self._guided(call, SplitLooks(call, place, kept), kept)
        return self._guided(call, WholeLooks(call, place, kept), kept)

    def _guided(self, call: AttentionCall, looks: "Looks", kept: KeysValues) -> torch.Tensor:
        own = h = _part(looks.attended, 1, looks.queries)
        towards = looks.at(kept) if self.all.place.changes else h
        for active, (adapter, shared) in zip(self.all.active, self.all.prepared, strict=True):
            if adapter.guides(self.name):
                parts = []
                for each in active.negatives:
                    difference = towards - looks.at(each.negative.keys_values_at(self.name, len(call.q)))
                    parts.append(each.weigh(difference, self.all.grid))
                own = adapter.add_inside_attention(self.name, own, sum(parts[1:], parts[0]), h, shared)
        if own.shape[1] != call.queries:
            before, after = looks.attended[:, : looks.queries.start], looks.attended[:, looks.queries.stop :]
            own = torch.cat([before, own, after], dim=1)
        return call.as_returned(own)


class Looks(Protocol):
    """A call of an attention function, and the same for its image's queries with other prompts.

    `queries`: the image's among all; `attended`: (b, all queries, w).
    """

    queries: slice
    attended: torch.Tensor

    def at(self, prompt: KeysValues) -> torch.Tensor:
        """What the image's queries get from a prompt's tokens, in joint attention with the image's own: (b, n, w)."""


class WholeLooks:
    """By the function itself, over all keys each time."""

    def __init__(self, call: AttentionCall, place: Place, kept: KeysValues):
        self.call, self.place = call, place
        self.image, _ = place.split(call.keys, kept.keys.shape[call.axis])
        self.queries = self.image if place.joint else slice(0, call.queries)
        self.attended = call.attended(call.run())

    def at(self, prompt: KeysValues) -> torch.Tensor:
        call = self.call
        q = _part(call.q, call.axis, self.queries)
        if not self.place.joint:
            return call.with_keys(q, prompt.keys, prompt.values, prompt.mask)
        k, v = (
            self._joined(_part(of_image, call.axis, self.image), of_prompt, call.axis)
            for of_image, of_prompt in ((call.k, prompt.keys), (call.v, prompt.values))
        )
        return call.with_keys(q, k, v, self._mask(prompt))

    def _mask(self, prompt: KeysValues) -> torch.Tensor | None:
        image = self.call.mask(self.queries, self.image)
        if image is None and prompt.mask is None:
            return None
        given = image if image is not None else prompt.mask
        assert given is not None
        nothing = torch.ones if given.dtype == torch.bool else torch.zeros

        def shaped(mask: torch.Tensor | None, keys: int) -> torch.Tensor:
            rows, heads, queries = len(self.call.q), given.shape[1], self.queries.stop - self.queries.start
            if mask is None:
                mask = nothing(1, 1, 1, keys, dtype=given.dtype, device=given.device)
            return mask.expand(rows, heads, queries, keys)

        tokens, m = self.image.stop - self.image.start, prompt.keys.shape[self.call.axis]
        return self._joined(shaped(image, tokens), shaped(prompt.mask, m), axis=-1)

    def _joined(self, of_image: torch.Tensor, of_prompt: torch.Tensor, axis: int) -> torch.Tensor:
        parts = (of_image, of_prompt) if self.place.last else (of_prompt, of_image)
        return torch.cat(parts, dim=axis)


class SplitLooks:
    """At the image once, and at each prompt apart (`split_attention.py`): of joint attention."""

    def __init__(self, call: AttentionCall, place: Place, kept: KeysValues):
        self.call = call
        self.queries, prompt = place.split(call.keys, kept.keys.shape[call.axis])
        self.q, k, v = (call.by_head(each) for each in (call.q, call.k, call.v))
        everything = slice(0, call.queries)
        of_image, of_prompt = (
            look(self.q, k[:, :, keys], v[:, :, keys], call.mask(everything, keys), call.kwargs.get("scale"))
            for keys in (self.queries, prompt)
        )
        self.attended = joined(of_image, of_prompt).transpose(1, 2).flatten(2)
        self.q, self.of_image = self.q[:, :, self.queries], of_image.narrow(self.queries)

    def at(self, prompt: KeysValues) -> torch.Tensor:
        k, v = (self.call.by_head(each) for each in (prompt.keys, prompt.values))
        of_prompt = look(self.q, k, v, prompt.mask, self.call.kwargs.get("scale"))
        return joined(self.of_image, of_prompt).transpose(1, 2).flatten(2)


def token_grid(tokens: int, sizes: torch.Size, patch: int, multiple: int = 1) -> tuple[int, ...] | None:
    """How image tokens, of patches x patch latent pixels, lie in latents of those `sizes`, (h, w) or (t, h, w).

    `multiple`: to one of that they are filled up. None: they don't, and may be more pictures than this one.
    """
    if len(sizes) < 2:
        return None  # several latents that ComfyUI has packed into one
    *times, height, width = sizes
    grid = (*times, math.ceil(height / patch), math.ceil(width / patch))
    return grid if math.ceil(math.prod(grid) / multiple) * multiple == tokens else None


def block_run(options: dict[str, Any]) -> dict[str, Any]:
    """transformer_options of a block, for another run of it."""
    override = options.get(OVERRIDE)
    return {**options, OVERRIDE: override.again()} if isinstance(override, GuidedAttention) else options

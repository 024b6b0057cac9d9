"""Networks that are one or several lists of blocks: the diffusion transformers, found by their family's row.

An evaluation is intercepted by hooks on modules, which every such network runs whatever else it calls:

- on linear layers, for low-rank changes that are not merged into their weights (`linears.py`);
- on what makes the vector of the timestep;
- on the blocks, to reach the attentions inside (`block_attention.py`).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...adapter import Adapter, Prepared
from ...config import AdapterLayer, Linear
from ...families import Family
from ..guided_step import GuidedStep
from ..prompt import KeysValues, token_mask
from .backbone import Backbone, UnsupportedModel
from .block_attention import (
    GuidedAttentions,
    KeepingAttention,
    OverrideFor,
    Place,
    block_run,
    overridden_attention,
    overridden_unhooked,
    token_grid,
    with_override,
)
from .compiled_network import compiled
from .linears import adapted_linears
from .module_hooks import hooked_before, hooked_behind
from .unhooked_attention import can_hook

# The latents of which a prompt's keys and values are kept: noise, as long as the picture and this wide. Positions in
# the attention may depend on the length, and hardly anything on what is in the picture where it is all noise.
_STRIP = 2
_SEED = 0
# What a condition says of tokens that the model has still to map.
_OF_UNMAPPED = {"t5xxl_ids", "t5xxl_weights", "unprocessed_ltxav_embeds"}
# What networks call the first layer that the prompt's tokens come to.
_PROMPT_LAYER = re.compile(r"^(?!.*time).*?(^|[._])(txt|text|context|caption|cap|prompt|cond|encoder)([._]|$)")


class Transformer(Backbone):
    """The lists, and where the prompt comes in, are in the family's row; the blocks' linear layers are seen.

    Of a network without a row both are told by what they look like, and nothing but its linear layers is changed.
    """

    layout = "transformer"
    prompts_pass_blocks = True
    overwrites = True

    def __init__(self, network: nn.Module, family: Family | None = None):
        super().__init__(network, family)
        self.row = family or Family("", "", layout="transformer", **_seen(network))

    @classmethod
    def recognises(cls, network: nn.Module) -> bool:
        return bool(_seen(network))

    @classmethod
    def fits(cls, network: nn.Module, family: Family) -> bool:
        try:
            for path in (*family.blocks, family.prompt_layer, family.time_embedding):
                network.get_submodule(path)
        except AttributeError:
            return False
        return bool(family.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those that work at a cross-attention's input and output have no place where one attention is for all."""
        return ("delta", "low_rank", "scale") if self._reaches_attention() else ("low_rank",)

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        return not self.row.attention_module

    def _reaches_attention(self) -> bool:
        if not self.row.attention_module:
            return bool(self.row.attention)
        blocks = self._blocks_with_prompt().values()
        return all(can_hook(block.get_submodule(self.row.attention_module)) for block in blocks)

    def layers(self) -> tuple[AdapterLayer, ...]:
        prompt_layer: Any = self.network.get_submodule(self.row.prompt_layer)
        context_dim, found = prompt_layer.in_features * self.row.prompt_parts, []
        for each in self.row.blocks:
            blocks = self._listed((each,))
            for (name, path), block in blocks.items():
                left_out = self.row.left_out + (self.row.unread if block is list(blocks.values())[-1] else ())
                linears = tuple(linear for linear in self._linears(block) if not _is_inside(linear.path, left_out))
                reads = each in self._lists_with_prompt()
                found.append(
                    AdapterLayer(name, path, _width(linears), context_dim, linears=linears, reads_prompt=reads)
                )
        return tuple(found)

    def _listed(self, lists: tuple[str, ...]) -> dict[tuple[str, str], nn.Module]:
        """The blocks of those lists, by their adapter layer's name and their path."""
        return {
            (f"{path.replace('.', '_')}_{index}", f"{path}.{index}"): block
            for path in lists
            for index, block in enumerate(self.network.get_submodule(path).children())
        }

    def _lists_with_prompt(self) -> tuple[str, ...]:
        """The lists of blocks in which the image looks at the prompt."""
        return (self.row.sites or self.row.blocks) if self.row.attention else ()

    def _linears(self, block: nn.Module) -> Iterator[Linear]:
        for path, module in block.named_modules():
            if hasattr(module, "in_features") and hasattr(module, "out_features"):
                yield Linear(path, module.in_features, module.out_features)

    @contextmanager
    def intercept(self, step: GuidedStep) -> Iterator[dict[str, Any]]:
        with ExitStack() as hooks, self._compiled(step):

            def prepare(network: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                """Before the network's forward(x, timesteps, context=...), as ComfyUI calls all of them."""
                x, timesteps = args[:2]
                step.visited[:] = step.layer_names()
                hooks.close()  # the one before, where a model takes several
                if self.runs_compiled(step):
                    return args, kwargs
                context, mask = kwargs.get("context"), token_mask(kwargs)
                prepared = step.prepare(self.timesteps(timesteps), context, _dtype(x), mask)
                if step.changes_linears:
                    hooks.enter_context(adapted_linears(self, prepared))
                if step.changes_vector:
                    hooks.enter_context(self._added_to_vector(prepared))
                if step.guides_attention:
                    prompts = step.positives(kwargs["transformer_options"].get("uuids") or [])
                    guided = GuidedAttentions(self._place(), step.active, prepared, prompts, self._grid())
                    hooks.enter_context(self._overridden(guided, step))
                    kwargs = with_override(kwargs, guided)
                return args, kwargs

            with hooked_before(self.network, prepare):
                yield {}

    def _compiled(self, step: GuidedStep) -> AbstractContextManager:
        """Inside, the network is compiled with the step's work in it, where the step says how."""
        if step.compile_options is None:
            return nullcontext()
        linears = [
            f"{layer.name} {linear.path}"
            for each in step.active
            for layer in (each.adapter.config.layers if each.changes_linears else ())
            for linear in each.adapter.kind.linears(layer)
        ]
        hooks = ["vector"] * step.changes_vector + ["attention"] * step.guides_attention + linears
        return compiled(self.network, ", ".join(hooks), step.compile_options)

    def runs_compiled(self, step: GuidedStep) -> bool:
        return not (step.changes_linears or step.changes_vector or step.guides_attention)

    def block_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept = super().block_arguments(kwargs)
        if "transformer_options" in kept:
            kept["transformer_options"] = block_run(kept["transformer_options"])
        return kept

    def _place(self) -> Place:
        joint, own_blocks = self.row.attention == "joint", bool(self.row.sites)  # of the prompt, before the image's
        return Place(joint, self.row.prompt_last, changes=joint or own_blocks)

    def _grid(self) -> Callable[..., tuple[int, ...] | None]:
        """The `TokenGrid` of these networks. Z-Image's fill their tokens up."""
        multiple = getattr(self.network, "pad_tokens_multiple", None) or 1
        return partial(token_grid, patch=self.row.patch, multiple=multiple)

    def _blocks_with_prompt(self) -> dict[str, nn.Module]:
        return {name: block for (name, _), block in self._listed(self._lists_with_prompt()).items()}

    def _overridden(self, override: OverrideFor, step: GuidedStep) -> AbstractContextManager[None]:
        """Inside, the attentions to the prompt that adapters work in have an `override`, in an evaluation of arguments
        that have it too."""
        every = self._blocks_with_prompt()
        blocks = {name: every[name] for name in step.guided_layers()}
        if not self.row.attention_module:
            return overridden_attention(blocks)
        if not self._reaches_attention():
            raise UnsupportedModel(
                "Another node has replaced this model's attention to the prompt, where the adapter works: bypass it, "
                f"or train an adapter of kind low_rank. Details: {self.row.attention_module} of a block of "
                f"{type(self.network).__name__}."
            )
        return overridden_unhooked(blocks, self.row.attention_module, override)

    def keys_values(
        self, model: Any, arguments: dict[str, Any], x: torch.Tensor, step: GuidedStep
    ) -> Iterator[tuple[str, KeysValues]]:
        """From an evaluation of the base on a strip of noise, with the step's changes of linear layers and nothing but
        the prompt: pictures to edit, guiding frames or a camera's path are no part of it."""
        strip, sigma = _strip(x, self.row.least_sides), model.model_sampling.sigma_max
        rows = len(arguments["c_crossattn"])
        noise = torch.randn(1, *strip.of(x).shape[1:], generator=torch.Generator().manual_seed(_SEED))
        noise = noise.to(x.device, torch.float32).expand(rows, *noise.shape[1:])
        sigmas = torch.full((rows,), float(sigma), device=x.device)
        start = model.model_sampling.noise_scaling(
            sigmas.view(-1, *[1] * (noise.ndim - 1)), noise, torch.zeros_like(noise), max_denoise=True
        )
        kept: dict[str, KeepingAttention] = {}

        tokens = _TokensSeen(self.network, self.row.prompt_at)

        def keeping(name: str, before: Callable | None) -> KeepingAttention:
            return kept.setdefault(name, KeepingAttention(before, self._place(), lambda: tokens.count))

        given = strip.arguments(arguments)
        given["transformer_options"] = {"sigmas": sigmas}
        with self._alone(step, rows), tokens, self._overridden(keeping, step):
            model._apply_model(start, sigmas, **with_override(given, keeping))
        for name, attention in kept.items():
            found = attention.keys_values()
            if found is not None:
                yield name, found

    @contextmanager
    def _alone(self, step: GuidedStep, rows: int) -> Iterator[None]:
        """Inside, only what the step's adapters do to linear layers is done."""
        with ExitStack() as evaluation:

            def prepare(network: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                x, timesteps = args[:2]
                prepared = step.prepare(self.timesteps(timesteps), kwargs.get("context"), _dtype(x))
                evaluation.enter_context(adapted_linears(self, prepared))
                return args, kwargs

            if step.changes_linears:
                evaluation.enter_context(hooked_before(self.network, prepare))
            yield

    @contextmanager
    def _added_to_vector(self, prepared: list[tuple[Adapter, Prepared]]) -> Iterator[None]:
        """Inside, adapters add (b, e) to the vector of the timestep."""
        changes = [shared.vector for _, shared in prepared if shared.vector is not None]
        change = sum(changes[1:], changes[0])

        def hook(module: nn.Module, inputs: tuple, out: torch.Tensor) -> torch.Tensor:
            return _added(out, change)

        with hooked_behind(self.network.get_submodule(self.row.time_embedding), hook):
            yield

    def vector(self) -> int:
        if not self.row.time_embedding:
            return 0
        return _outputs(self.network.get_submodule(self.row.time_embedding))

    def condition_of(self, model: Any, cond: dict) -> dict:
        """Anima and LTX-2 map tokens by a part of their own, Anima not where gradients may come: so it is done here."""
        if not cond.keys() & _OF_UNMAPPED:
            return cond
        with torch.inference_mode():
            mapped = model.extra_conds(**cond, device=next(self.network.parameters()).device)["c_crossattn"].cond
        kept = {key: value for key, value in cond.items() if key not in _OF_UNMAPPED}
        return {**kept, "cross_attn": mapped.clone()}

    def latent_shape(self, latent_format, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        channels, *sizes = super().latent_shape(latent_format, width, height, frames)
        return channels + (self.row.sound.extra_channels(sizes) if self.row.sound else 0), *sizes

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(self.row.sound.split(x)) if self.row.sound else super().split(x)

    def join(self, latents: list[torch.Tensor]) -> torch.Tensor:
        return self.row.sound.join(*latents) if self.row.sound else super().join(latents)

    def timesteps(self, t: Any) -> torch.Tensor:
        t = t[0] if isinstance(t, (tuple, list)) else t  # of video and sound
        t = t if t.ndim == 1 else t.flatten(1).amax(dim=1)  # of video whose frames have their own
        return t * self.row.timestep_scale


def _added(vector: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """vector (b, ..., e), or one for each frame of b rows, with change (b, e)."""
    change = change.to(vector.dtype).repeat_interleave(len(vector) // len(change), dim=0)
    return vector + change.view(len(change), *[1] * (vector.ndim - 2), -1)


def _seen(network: nn.Module) -> dict[str, Any]:
    """A network's lists of blocks, and its prompt layer, as a row names them; nothing if it doesn't look like one."""
    lists = [(name, child) for name, child in network.named_children() if isinstance(child, nn.ModuleList)]
    blocks = tuple(name for name, each in lists if len({type(block) for block in each}) == 1 and _has_layers(each[0]))
    inside = tuple(f"{name}." for name in blocks)
    for path, module in network.named_modules():
        if hasattr(module, "in_features") and not path.startswith(inside) and _PROMPT_LAYER.search(path) and blocks:
            return {"blocks": blocks, "prompt_layer": path}
    return {}


def _has_layers(block: nn.Module) -> bool:
    """Whether it is a block: attention and what comes behind it are two linear layers at least."""
    return sum(hasattr(module, "in_features") for module in block.modules()) > 1


def _is_inside(path: str, modules: tuple[str, ...]) -> bool:
    """Whether a layer is one of those modules, or in one of them."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _outputs(module: nn.Module) -> int:
    """Channels of what a module ends with, a linear layer or a norm."""
    layers: list[Any] = [each for each in module.modules() if getattr(each, "weight", None) is not None]
    return layers[-1].out_features if hasattr(layers[-1], "out_features") else layers[-1].weight.shape[-1]


def _width(linears: tuple[Linear, ...]) -> int:
    """Channels of a block's image tokens: most of its layers are given those, or of two kinds of tokens the wider."""
    inputs = [linear.inputs for linear in linears]
    return max((width for width in inputs if inputs.count(width) > 2), default=max(inputs, key=inputs.count))


def _dtype(x: Any) -> torch.dtype:
    """Of a network's input, which may be several latents."""
    return x.dtype if isinstance(x, torch.Tensor) else x[0].dtype


@dataclass(frozen=True)
class _Strip:
    """A part of latents: all of the longer side, little of the other, and of video one frame. `axes`: sizes of the
    latents' own, by what is left of them."""

    axes: tuple[tuple[int, int], ...]

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """Of what has the latents' axes as its last ones."""
        for axis, (_, kept) in enumerate(self.axes, start=-len(self.axes)):
            value = value.narrow(axis, 0, kept)
        return value

    def arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of `apply_model` for the part: what lies as the latents do is cut as well, and whatever else there is
        of pictures is left out, for both prompts alike. What networks can't run without, lies as the latents do."""
        width = arguments["c_crossattn"].shape[-1]
        cut = {key: self.of(value) for key, value in arguments.items() if self._fits(value)}
        others = {key: value for key, value in arguments.items() if not (key in cut or _is_of_pictures(value, width))}
        return {**others, **cut}

    def _fits(self, value: Any) -> bool:
        sizes = [size for size, _ in self.axes]
        return isinstance(value, torch.Tensor) and list(value.shape[2:])[-len(sizes) :] == sizes


def _is_of_pictures(value: Any, width: int) -> bool:
    """Whether an argument is latents, masks, places, ... of a picture, or a list of those. Tokens are (b, m, width), or
    of several layers of a text encoder (b, layers, m, width)."""
    if isinstance(value, list):
        return any(isinstance(each, torch.Tensor) for each in value)
    return isinstance(value, torch.Tensor) and value.ndim > 3 and value.shape[-1] != width


def _strip(x: torch.Tensor, least_sides: int) -> _Strip:
    """For latents x (b, c, h, w) or (b, c, t, h, w); several that ComfyUI has packed into one stay whole.

    `least_sides`: what height and width have to be together.
    """
    if x.ndim < 4:
        return _Strip(tuple((size, size) for size in x.shape[2:]))
    *times, height, width = x.shape[2:]
    short = max(_STRIP, least_sides - max(height, width))
    kept = (height, min(width, short)) if height > width else (min(height, short), width)
    return _Strip((*((frames, 1) for frames in times), (height, kept[0]), (width, kept[1])))


class _TokensSeen:
    """Inside, `count` becomes the number of prompt tokens that a network's blocks are given.

    `place`: "path": a module, of which they are the output; "path:argument": of its forward, by position or keyword.
    """

    def __init__(self, network: nn.Module, place: str):
        self.path, _, self.argument = place.partition(":")
        self.module, self.count = network.get_submodule(self.path), 0

    def __enter__(self) -> "_TokensSeen":
        if self.argument:
            self._handle = self.module.register_forward_pre_hook(self._see_argument, with_kwargs=True)
        else:
            self._handle = self.module.register_forward_hook(self._see_output)
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()

    def _see_output(self, module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        self.count = out.shape[-2]

    def _see_argument(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        value = args[int(self.argument)] if self.argument.isdigit() else kwargs[self.argument]
        self.count = value.shape[-2]

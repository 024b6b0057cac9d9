"""What adapters do in one step of sampling or training, as data: it travels with each evaluation of the model."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..adapter import Adapter, Prepared
from ..layers import fit_rows
from .prompt import Prompt, difference_of

if TYPE_CHECKING:
    from .sampling.negatives import WeightedNegative

# Under this name ComfyUI keeps our wrappers and additional models, and transformer_options what the hooks need.
KEY = "agd"


@dataclass(frozen=True)
class ActiveAdapter:
    """An adapter at work. Numbers are tensors, for torch.compile would take plain ones for constants.

    `omega`: (1,) or (b,), one per row; `strength`: (1,). `negatives`: for adapters that use them, else empty. `merged`:
    whether what it does to linear layers is in their weights, see `sampling/merging.py`.
    """

    adapter: Adapter
    omega: torch.Tensor
    strength: torch.Tensor
    negatives: "tuple[WeightedNegative, ...]" = ()
    merged: bool = False

    @property
    def changes_linears(self) -> bool:
        """Whether it works on the base's linear layers while they are evaluated."""
        return self.adapter.config.changes_linears and not self.merged

    def difference(self, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """(b, d), of the prompt's tokens (b, m, d) and the negatives', if the adapter has a use for it."""
        if not self.adapter.changes_vector:
            return None
        rows, negative = len(context), torch.zeros((), device=context.device)
        for weighted in self.negatives:
            mean = fit_rows(weighted.negative.mean_token(context.device), rows)
            negative = negative + (mean if weighted.weight is None else mean * weighted.share(rows))
        return difference_of(context, mask, negative)

    def for_rows(self, areas: list, shape: torch.Size) -> "ActiveAdapter":
        return replace(self, negatives=tuple(negative.cropped(areas, shape) for negative in self.negatives))


@dataclass
class GuidedStep:
    """What an evaluation needs to be guided by adapters.

    `areas`: of conditions that have one, by their uuid; `visited` lists the blocks of the last evaluation that could be
    adapter layers; `places`: all of those in their order, for blocks that don't say which they are; `attentions`: heads
    and precision of the layers' attentions, for adapters that work inside them. `prompts`: the positive ones by their
    conditions' uuid, or by None where all rows are of one, if the base's attentions need them; `compile_options`: of
    torch.compile, if the base is to be compiled with what adapters do in it.
    """

    active: tuple[ActiveAdapter, ...]
    areas: dict = field(default_factory=dict)
    visited: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    attentions: dict[str, tuple] = field(default_factory=dict)
    prompts: dict[Any, Prompt] = field(default_factory=dict)
    compile_options: dict[str, Any] | None = None

    def layer_names(self) -> list[str]:
        """Every layer that an adapter has something for."""
        names = (layer.name for active in self.active for layer in active.adapter.config.layers)
        return list(dict.fromkeys(names))

    def guided_layers(self) -> list[str]:
        """Every layer in whose attention an adapter works."""
        return list(dict.fromkeys(name for active in self.active for name in active.adapter.guided_layers))

    def visited_all_layers(self) -> bool:
        """Whether the last evaluation came by every adapter layer."""
        return set(self.layer_names()) <= set(self.visited)

    @property
    def uses_time(self) -> bool:
        """Whether an adapter needs the base's own embedding of the timestep."""
        return any(active.adapter.config.kind.uses_time for active in self.active)

    @property
    def changes_linears(self) -> bool:
        """Whether an adapter works on the base's linear layers, where torch.compile would not see it come and go."""
        return any(active.changes_linears for active in self.active)

    @property
    def guides_attention(self) -> bool:
        """Whether an adapter works inside the attentions."""
        return any(active.adapter.guides_attention for active in self.active)

    @property
    def changes_vector(self) -> bool:
        """Whether an adapter adds to the vector of the timestep."""
        return any(active.adapter.changes_vector for active in self.active)

    @property
    def at_attention(self) -> bool:
        """Whether an adapter works inside the attentions, or adds to what they return."""
        return self.guides_attention or any(active.adapter.changes_attention_output for active in self.active)

    def for_rows(self, x: torch.Tensor, transformer_options: dict) -> "GuidedStep":
        """For latents x (b, c, h, w) that ComfyUI has put together of several conditions. It shares `visited`."""
        if not self.areas:
            return self
        areas = [self.areas.get(uuid) for uuid in transformer_options.get("uuids") or [None]]
        return replace(self, active=tuple(active.for_rows(areas, x.shape) for active in self.active))

    def positives(self, uuids: list) -> list[Prompt]:
        """The positive prompts of an evaluation of conditions with those uuids, in the order of its rows."""
        return [self.prompts[None]] if None in self.prompts else [self.prompts[uuid] for uuid in uuids]

    def negatives(self) -> list[Prompt]:
        """The negative prompts whose keys and values are used."""
        guiding = (active for active in self.active if active.adapter.guides_attention)
        return [weighted.negative for active in guiding for weighted in active.negatives]

    def bring_mean_tokens(self, device: torch.device) -> None:
        """Before the evaluation, so that torch.compile finds those of the negatives made."""
        for active in self.active:
            for weighted in active.negatives if active.adapter.changes_vector else ():
                weighted.negative.mean_token(device)

    def prepare(
        self,
        t: torch.Tensor,
        context: Any,
        dtype: torch.dtype,
        mask: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
    ) -> list[tuple[Adapter, Prepared]]:
        """Once per evaluation, what does not depend on the image.

        t: (b,), timesteps from 0 to 1000; context (b, m, d), or None where a model has none; `dtype`: of the base's
        activations; `mask`: (b, m), which of the tokens count, if not all do; `time`: (b, e), the base's own embedding
        of t, where an adapter uses it.
        """
        prepared = []
        for each in self.active:
            more = {"strength": each.strength, "difference": each.difference(context, mask), "time": time}
            prepared.append((each.adapter, each.adapter.prepare(each.omega, t, context, dtype=dtype, **more)))
        return prepared


class CurrentStep(Protocol):
    """What `transformer_options` has under KEY: the `step` that evaluations are part of at the moment, if any."""

    step: GuidedStep | None

    def on_unguided_evaluation(self) -> None:
        """Called for an evaluation outside of any step, which is the base's own then. It may raise."""


@dataclass(frozen=True)
class FixedStep:
    """The `CurrentStep` of training, where all evaluations belong to one."""

    step: GuidedStep | None

    def on_unguided_evaluation(self) -> None:
        pass


def with_step(transformer_options: dict, step: GuidedStep) -> dict:
    """A copy of `transformer_options` with which evaluations are guided by `step`."""
    return {**transformer_options, KEY: FixedStep(step)}

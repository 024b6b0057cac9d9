"""What adapters do in one step of sampling or training, as data: it travels with each evaluation of the model."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..adapter import Adapter, Prepared

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

    def for_rows(self, areas: list, shape: torch.Size) -> "ActiveAdapter":
        return replace(self, negatives=tuple(negative.cropped(areas, shape) for negative in self.negatives))


@dataclass
class GuidedStep:
    """What an evaluation needs to be guided by adapters.

    `areas`: of conditions that have one, by their uuid; `visited` lists the adapter layers of the last evaluation;
    `attentions`: heads and precision of the layers' attentions, for adapters that work inside them.
    """

    active: tuple[ActiveAdapter, ...]
    areas: dict = field(default_factory=dict)
    visited: list[str] = field(default_factory=list)
    attentions: dict[str, tuple] = field(default_factory=dict)

    def layer_names(self) -> list[str]:
        """All adapter layers in the order of evaluation."""
        return [layer.name for layer in self.active[0].adapter.config.layers]

    @property
    def changes_linears(self) -> bool:
        """Whether an adapter works on the base's linear layers, where torch.compile would not see it come and go."""
        return any(active.changes_linears for active in self.active)

    @property
    def inside_attention(self) -> bool:
        """Whether an adapter works inside the attentions."""
        return any(active.adapter.uses_negative for active in self.active)

    @property
    def at_attention(self) -> bool:
        """Whether an adapter works inside the attentions, or adds to what they return."""
        return self.inside_attention or any(active.adapter.changes_attention_output for active in self.active)

    def for_rows(self, x: torch.Tensor, transformer_options: dict) -> "GuidedStep":
        """For latents x (b, c, h, w) that ComfyUI has put together of several conditions. It shares `visited`."""
        if not self.areas:
            return self
        areas = [self.areas.get(uuid) for uuid in transformer_options.get("uuids") or [None]]
        return replace(self, active=tuple(active.for_rows(areas, x.shape) for active in self.active))

    def prepare(self, t: torch.Tensor, context: Any, dtype: torch.dtype) -> list[tuple[Adapter, Prepared]]:
        """Once per evaluation, what does not depend on the image.

        t: (b,), timesteps from 0 to 1000; context (b, m, d), or None where a model has none; `dtype`: of the base's
        activations.
        """
        return [
            (each.adapter, each.adapter.prepare(each.omega, t, context, dtype=dtype, strength=each.strength))
            for each in self.active
        ]


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

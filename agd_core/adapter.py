"""Adapters of a frozen base that embed guidance into one evaluation (arXiv 2503.07274, and kinds of our own).

`psi`, the adapter's parameters, are the only trained ones. What depends on (omega, t, c) alone is computed for all
layers together, once per evaluation (`Adapter.prepare`); what is left to do in a layer depends on the kind (`kinds/`).

Shapes: b rows, n image tokens, m prompt tokens, d their channels (`context_dim`), w channels of a layer, D channels of
the encoders' tokens, S layers, E encoders of (omega, t): 1, S if every layer has its own, 0 if there is no use for one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import AdapterConfig, EncodedKindConfig
from .kinds import KINDS
from .layers import Guidance, GuidanceEncoder, fit_rows
from .mixed_precision import MixedPrecision


@dataclass
class Prepared:
    """What an evaluation's layers share, made by `Adapter.prepare`.

    `gain`: (b, 1, 1), the factor of every residual; `context`: the prompt that `shared`, the kind's own part, was made
    for; it is indexed by layer. `vector`: (b, e), what is added to the vector of the timestep, if it is changed.
    """

    guidance: Guidance
    gain: torch.Tensor
    context: torch.Tensor
    shared: Any
    vector: torch.Tensor | None = None

    def of_layer(self, index: int, rows: int) -> tuple[torch.Tensor, Any]:
        """The gain, and a layer's part of `shared`, for an attention of so many rows.

        Other nodes multiply rows there, one for each region of a picture, say: as a batch is repeated.
        """
        own = self.shared[index]
        return (self.gain, own) if rows == len(self.gain) else (fit_rows(self.gain, rows), _repeat_rows(own, rows))


def _repeat_rows(shared, rows: int):
    """What a layer has by row, in whatever it is kept."""
    if isinstance(shared, torch.Tensor):
        return fit_rows(shared, rows)
    if isinstance(shared, dict):
        return {key: _repeat_rows(value, rows) for key, value in shared.items()}
    return shared if shared is None else tuple(_repeat_rows(value, rows) for value in shared)


class Adapter(nn.Module):
    """All layers of one base. `operations` are their classes: torch's, `MixedPrecision` or ComfyUI's."""

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.config = config
        kind, encoders = KINDS[config.kind.name], config.kind.encoders(len(config.layers))
        self.encoders = nn.ModuleList()
        if isinstance(config.kind, EncodedKindConfig):
            width = kind.token_width(config)
            self.encoders.extend(GuidanceEncoder(config.kind, width, operations) for _ in range(encoders))
        self.kind = kind(config, operations)
        # Not trained: the prompt tokens of the unconditional, to tell another negative prompt from it, and to stand in
        # for one where a workflow has none.
        self.register_buffer("unconditional", torch.zeros(config.prompt_tokens, config.context_dim))
        self._index = {layer.name: index for index, layer in enumerate(config.layers)}
        self._guided = dict.fromkeys(layer.name for layer in config.guided_layers)
        if operations in (nn, MixedPrecision):  # comfy.ops layers hold nothing yet and are only ever loaded into
            self.kind.init_weights()

    @property
    def uses_negative(self) -> bool:
        """Whether the negative prompt has an effect."""
        return self.config.kind.uses_negative

    @property
    def guides_attention(self) -> bool:
        """Whether it works inside the attentions, and needs what they make of the negative prompt."""
        return bool(self._guided)

    @property
    def changes_vector(self) -> bool:
        """Whether it adds to the vector of the timestep."""
        return self.kind.vector is not None

    @property
    def changes_attention_output(self) -> bool:
        """Whether it adds to what the attentions return."""
        return self.kind.changes_attention_output

    def prepare(
        self,
        omega: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        *,
        dtype: torch.dtype,
        strength=1.0,
        difference: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
    ) -> Prepared:
        """omega (b,) or (1,), t (b,), context (b, m, d) -> what the layers need. `strength` multiplies the residuals.

        `difference`: (b, d) of both prompts, for an adapter that changes the vector of the timestep; `time`: (b, e),
        the base's own embedding of t, for one that uses it.
        """
        omega = omega.to(t.device).expand(t.shape[0]).float()
        tokens = [encoder(omega, t, dtype) for encoder in self.encoders]
        guidance = Guidance(omega, t.float(), time, torch.stack(tokens, dim=1) if tokens else None, dtype)
        gain = (strength * self._gain(omega)).to(dtype)[:, None, None]
        vector = None
        if self.kind.vector is not None:
            assert difference is not None
            vector = gain[:, 0] * self.kind.vector(guidance, difference)
        return Prepared(guidance, gain, context, self.kind.prepare(guidance, context), vector)

    def _gain(self, omega: torch.Tensor) -> torch.Tensor:
        """omega (b,) -> (b,). Without a gain omega = 1 would not be the base itself, so residuals are dropped there."""
        kind = self.config.kind
        if kind.gain:
            return omega - 1
        return torch.ones_like(omega) if kind.acts_at_1 else (omega != 1).float()

    def has_layer(self, name: str) -> bool:
        """Whether that layer of the base is one of its own."""
        return name in self._index

    @property
    def guided_layers(self) -> Iterable[str]:
        """The names of those in whose attention to the prompt it works, in the order of evaluation."""
        return self._guided

    def guides(self, name: str) -> bool:
        """Whether it works inside that layer's attention to the prompt."""
        return name in self._guided

    def add_after_attention(
        self, name: str, out: torch.Tensor, h: torch.Tensor, context: torch.Tensor, prepared: Prepared
    ) -> torch.Tensor:
        """A layer's attention output `out` (b, n, w) with its residual: h (b, n, w), context (b, m, d) -> (b, n, w)."""
        if context is not prepared.context:  # another patch gives this layer, or all from here on, another prompt
            prepared.context = context
            prepared.shared = self.kind.prepare(prepared.guidance.for_rows(len(context)), context)
        gain = fit_rows(prepared.gain, len(out))
        return torch.addcmul(out, gain, self.kind.after_attention(name, h, prepared.shared[self._index[name]]))

    def add_inside_attention(
        self, name: str, out: torch.Tensor, delta: torch.Tensor, h: torch.Tensor, prepared: Prepared
    ) -> torch.Tensor:
        """What a layer's attention hands to `to_out`, with the residual: out, delta and h (b, n, w) -> (b, n, w)."""
        gain, shared = prepared.of_layer(self._index[name], len(out))
        return torch.addcmul(out, gain, self.kind.inside_attention(name, delta, h, shared))

    def add_at_linear(
        self, name: str, path: str, out: torch.Tensor, x: torch.Tensor, prepared: Prepared
    ) -> torch.Tensor:
        """What a linear layer of a layer's block returns, with the residual: out (b, n, out), its input x (b, n, in).

        `path` is the linear layer's in the block. In `out`'s dtype: under autocast that is not the preparation's.
        What a block makes of its timestep's vector has no tokens, out (b, out), and tokens may lie on several axes.
        """
        if out.ndim != 3:
            tokens = (len(out), -1)
            flat = self.add_at_linear(
                name, path, out.reshape(*tokens, out.shape[-1]), x.reshape(*tokens, x.shape[-1]), prepared
            )
            return flat.view_as(out)
        gain, shared = prepared.of_layer(self._index[name], len(out))
        return torch.addcmul(out, gain.to(out.dtype), self.kind.at_linear(name, path, x, shared))

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """psi: every parameter, by name. There is nothing else to freeze, save or load but the buffers."""
        return self.named_parameters()

    def zero_initialised(self) -> Iterable[nn.Module]:
        """The layers that a new adapter starts at zero."""
        return self.kind.zero_initialised()

    def parameter_count(self) -> int:
        return sum(parameter.numel() for _, parameter in self.trained())

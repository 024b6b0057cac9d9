"""Adapters of a frozen base that embed guidance into one evaluation (arXiv 2503.07274, and DESIGN's own kinds).

`psi`, the adapter's parameters, are the only trained ones. What depends on (omega, t, c) alone is computed for all
sites together, once per evaluation (`Adapter.prepare`); what is left to do at a site depends on the kind (`kinds/`).

Shapes: b rows, n image tokens, m prompt tokens, d their channels (`context_dim`), w channels of a site, D channels of
the encoders' tokens, S sites, E encoders of (omega, t): 1, S if every site has its own, 0 if there is no use for one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .config import AdapterConfig
from .kinds import KINDS, hears_negative
from .layers import Guidance, GuidanceEncoder, fit_rows
from .mixed_precision import MixedPrecision


@dataclass
class Prepared:
    """What an evaluation's sites share, made by `Adapter.prepare`.

    `gain`: (b, 1, 1), the factor of every residual; `context`: the prompt that `shared`, the kind's own part, was made
    for; it is indexed by site.
    """

    guidance: Guidance
    gain: torch.Tensor
    context: torch.Tensor
    shared: torch.Tensor | list

    def of_site(self, index: int, rows: int):
        """The gain, and a site's part of `shared`, for an attention of so many rows.

        Other nodes multiply rows there, one for each region of a picture, say: as a batch is repeated.
        """
        own = self.shared[index]
        return (self.gain, own) if rows == len(self.gain) else (fit_rows(self.gain, rows), _fit(own, rows))


def _fit(shared, rows: int):
    """What a site shares by row, in whatever it is kept."""
    if isinstance(shared, torch.Tensor):
        return fit_rows(shared, rows)
    if isinstance(shared, dict):
        return {key: _fit(value, rows) for key, value in shared.items()}
    return shared if shared is None else tuple(_fit(value, rows) for value in shared)


class Adapter(nn.Module):
    """All sites of one base. `operations` are the layers' classes: torch's, `MixedPrecision` or ComfyUI's."""

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.config = config
        kind = KINDS[config.kind]
        # The paper's tokens stand beside those of the prompt; elsewhere they only modulate.
        width = config.context_dim if kind.place == "output" else config.encoder_width
        self.encoders = nn.ModuleList(GuidanceEncoder(config, width, operations) for _ in range(config.encoders))
        self.sites = kind(config, operations)
        # Not trained: the prompt tokens of the unconditional, to tell another negative prompt from it, and to stand in
        # for one where a workflow has none.
        self.register_buffer("unconditional", torch.zeros(config.prompt_tokens, config.context_dim))
        self._index = {site.name: index for index, site in enumerate(config.sites)}
        if operations in (nn, MixedPrecision):  # comfy.ops layers hold nothing yet and are only ever loaded into
            self.sites.start()

    @property
    def place(self) -> str:
        """Where in the base this kind works; see `kinds`."""
        return self.sites.place

    @property
    def uses_negative(self) -> bool:
        """Whether it uses the negative prompt."""
        return hears_negative(self.config.kind)

    def prepare(
        self, omega: torch.Tensor, t: torch.Tensor, context: torch.Tensor, *, dtype: torch.dtype, strength=1.0
    ) -> Prepared:
        """omega (b,) or (1,), t (b,), context (b, m, d) -> what the sites need. `strength` multiplies the residuals.

        Without the gain omega = 1 would not be the base itself, so residuals are dropped there.
        """
        omega = omega.to(t.device).expand(t.shape[0]).float()
        gain = strength * (omega - 1 if self.config.gain else (omega != 1).float())
        tokens = [encoder(omega, t, dtype) for encoder in self.encoders]
        guidance = Guidance(t.float(), torch.stack(tokens, dim=1) if tokens else None, dtype)
        return Prepared(guidance, gain.to(dtype)[:, None, None], context, self.sites.prepare(guidance, context))

    def add(
        self, name: str, out: torch.Tensor, h: torch.Tensor, context: torch.Tensor, prepared: Prepared
    ) -> torch.Tensor:
        """A site's attention output `out` (b, n, w) with its residual: h (b, n, w), context (b, m, d) -> (b, n, w)."""
        if context is not prepared.context:  # another patch gives this site, or all from here on, another prompt
            prepared.context = context
            prepared.shared = self.sites.prepare(prepared.guidance.for_rows(len(context)), context)
        gain = fit_rows(prepared.gain, len(out))
        return torch.addcmul(out, gain, self.sites(name, h, prepared.shared[self._index[name]]))

    def guide(
        self, name: str, out: torch.Tensor, delta: torch.Tensor, h: torch.Tensor, prepared: Prepared
    ) -> torch.Tensor:
        """What a site's attention hands to its `to_out`, with the residual: out, delta and h (b, n, w) -> (b, n, w)."""
        gain, shared = prepared.of_site(self._index[name], len(out))
        return torch.addcmul(out, gain, self.sites(name, delta, h, shared))

    def adapt(self, name: str, path: str, out: torch.Tensor, x: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        """What a linear layer of a site's block returns, with the residual: out (b, n, out), its input x (b, n, in).

        `path` is the layer's in the block. In `out`'s dtype: under autocast that is not the one of the preparation.
        """
        gain, shared = prepared.of_site(self._index[name], len(out))
        return torch.addcmul(out, gain.to(out.dtype), self.sites.linear(name, path, x, shared))

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """psi: every parameter, by name. There is nothing else to freeze, save or load but the buffers."""
        return self.named_parameters()

    @property
    def paths(self) -> list[str]:
        """The linear layers of each block that get something added, by their path, where `config.changes_linears`."""
        return (self.sites if self.place == "linear" else self.sites.low_rank).paths

    def last(self) -> Iterable[nn.Module]:
        """The layers that a new adapter starts at zero, one per site or per linear layer."""
        low_rank = getattr(self.sites, "low_rank", None)
        return [*self.sites.to_out.values(), *(low_rank.to_out.values() if low_rank is not None else ())]

    def parameter_count(self) -> int:
        return sum(parameter.numel() for _, parameter in self.trained())

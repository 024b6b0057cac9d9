"""Low-rank changes of the base's own linear layers, scaled by guidance (DESIGN 1.3).

Each linear layer W of the transformer blocks becomes

    W x + (omega - 1) * B (m(t, omega) * A x)

Without m that is a plain LoRA of strength omega - 1 (`agd_core/lora.py` writes it as one).

Shapes: b rows, n tokens, r the rank (`hidden`), S sites, L layers of a site, E `encoder_width`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..config import AdapterConfig, Site
from ..layers import Guidance, zero_init


def layers_of(site: Site) -> dict[str, tuple[int, int]]:
    """The linear layers of a site's transformer block: path in the block -> channels (in, out)."""
    w, d = site.width, site.context_dim
    return {
        **{f"attn1.{layer}": (w, w) for layer in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"attn2.{layer}": (w, w) for layer in ("to_q", "to_out.0")},
        **{f"attn2.{layer}": (d, w) for layer in ("to_k", "to_v")},
        "ff.net.0.proj": (w, 8 * w),  # values and gates of GEGLU
        "ff.net.2": (4 * w, w),
    }


def key_of(site: str, layer: str) -> str:
    """A layer's name in the adapter's state, where a dot would be a level of its own."""
    return f"{site}_{layer}".replace(".", "_")


class LowRankAdapter(nn.Module):
    """`B (m * A x)` for each linear layer; B (`to_out`) starts at zero and m at one."""

    place = "linear"

    def __init__(self, config: AdapterConfig, operations=nn, leave: tuple[str, ...] = ()):
        """`leave`: layers of the blocks that stay as they are."""
        super().__init__()
        self.count, rank = len(config.sites), config.hidden
        self.paths = [path for path in layers_of(config.sites[0]) if path not in leave]
        sizes = {key_of(site.name, path): layers_of(site)[path] for site in config.sites for path in self.paths}
        # The modulation of all layers, so that it costs one product per evaluation.
        inner = 2 * config.encoder_width
        self.to_modulation = operations.Linear(inner, len(sizes) * rank) if config.modulated else None
        self.down = nn.ModuleDict({key: operations.Linear(i, rank, bias=False) for key, (i, _) in sizes.items()})
        self.to_out = nn.ModuleDict({key: operations.Linear(rank, o, bias=False) for key, (_, o) in sizes.items()})

    def start(self) -> None:
        """A new adapter adds exactly nothing."""
        zero_init(self.to_out)
        if self.to_modulation is not None:
            zero_init(self.to_modulation)

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> list[dict[str, torch.Tensor | None]]:
        """guidance with tokens (b, 1, 2, E) -> per site, by layer, m (b, 1, r)."""
        if self.to_modulation is None:
            return [dict.fromkeys(self.paths)] * self.count
        m = 1 + self.to_modulation(F.silu(guidance.tokens.flatten(2)))  # (b, 1, S L r)
        m = rearrange(m, "b n (s l r) -> s l b n r", s=self.count, l=len(self.paths))
        return [dict(zip(self.paths, own.unbind(), strict=True)) for own in m.unbind()]

    def linear(self, name: str, path: str, x: torch.Tensor, shared: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """What a site's layer `path` is given, (b, n, in), and the site's part of `prepare` -> what is added to the
        layer's output, (b, n, out)."""
        hidden, m = self.down[key_of(name, path)](x), shared[path]
        return self.to_out[key_of(name, path)](hidden if m is None else hidden * m)

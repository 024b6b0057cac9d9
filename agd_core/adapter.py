"""The adapters of "Efficient Distillation of Classifier-Free Guidance using Adapters" (arXiv 2503.07274).

At each cross-attention site of the frozen base the output becomes `attn2(h) + g_psi(h, omega, t, c)`, with `h` the
normalised input of that attention. `psi` are the only trained parameters.

Shapes: b rows, n image tokens, m prompt tokens, d their channels (`context_dim`), w channels of a site, H `hidden`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .config import AdapterConfig, Site

# Attention heads of an adapter; up to H = 512 each stays within the 128 channels of fused attention kernels.
HEADS = 4


def zero_init(layer: nn.Module) -> nn.Module:
    """Zero a last projection, so that a new adapter adds exactly nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sinusoidal(position: torch.Tensor, width: int, max_period: float) -> torch.Tensor:
    """Sines and cosines of `position` (b,), periods 2 pi ... 2 pi max_period -> (b, width), fp32."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=position.device) / half)
    angles = position.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GuidanceEncoder(nn.Module):
    """(omega, t) -> two tokens in the space of the prompt tokens, one for each."""

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        e, d = config.encoder_width, config.context_dim
        self.width = e
        self.log_omega = config.omega_embedding == "log"
        if not self.log_omega:
            # The authors' random Fourier features; part of the adapter's state, because they are random.
            self.register_buffer("frequencies", torch.randn(e // 2))
        self.omega = nn.Sequential(operations.Linear(e, e), nn.SiLU(), operations.Linear(e, d))
        self.time = nn.Sequential(operations.Linear(e, e), nn.SiLU(), operations.Linear(e, d))

    def embed_omega(self, omega: torch.Tensor) -> torch.Tensor:
        """(b,) -> (b, e), fp32."""
        if self.log_omega:
            # Ten radians per factor e at the finest: omega = 7 and 7.5 stay close. Below 1e-2 nothing is guidance.
            return sinusoidal(10 * omega.float().clamp(min=1e-2).log(), self.width, max_period=100)
        angles = 2 * math.pi * omega.float()[:, None] * self.frequencies.float().to(omega.device)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, omega: torch.Tensor, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """omega (b,), t (b,) in the model's timesteps -> (b, 2, d) in `dtype`."""
        embedded_t = sinusoidal(t, self.width, max_period=10_000)
        return torch.stack([self.omega(self.embed_omega(omega).to(dtype)), self.time(embedded_t.to(dtype))], dim=1)


class CrossAttentionAdapter(nn.Module):
    """Queries from `h`, keys and values from [omega token, t token, prompt tokens]; the output starts at zero."""

    def __init__(self, site: Site, config: AdapterConfig, operations=nn):
        super().__init__()
        w, d, hidden = site.width, site.context_dim, config.hidden
        self.to_q = operations.Linear(w, hidden, bias=False)
        self.to_k = operations.Linear(d, hidden, bias=False)
        self.to_v = operations.Linear(d, hidden, bias=False)
        self.to_out = operations.Linear(hidden, w)

    def last(self) -> nn.Module:
        return self.to_out

    def forward(self, h: torch.Tensor, context: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """h (b, n, w), context (b, m, d), tokens (b, 2, d) -> (b, n, w)."""
        sequence = torch.cat([tokens, context], dim=1)  # (b, 2 + m, d)
        q, k, v = (
            rearrange(x, "b n (h d) -> b h n d", h=HEADS)
            for x in (self.to_q(h), self.to_k(sequence), self.to_v(sequence))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class OffsetAdapter(nn.Module):
    """One vector from (omega, t, pooled condition), added to every token. The pooled condition is the tokens' mean."""

    def __init__(self, site: Site, config: AdapterConfig, operations=nn):
        super().__init__()
        self.into = operations.Linear(3 * site.context_dim, config.hidden)
        self.out = operations.Linear(config.hidden, site.width)

    def last(self) -> nn.Module:
        return self.out

    def forward(self, h: torch.Tensor, context: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """h (b, n, w), context (b, m, d), tokens (b, 2, d) -> (b, 1, w), the same for each of the n tokens."""
        condition = torch.cat([tokens.flatten(1), context.mean(1)], dim=-1)  # (b, 3 d)
        return self.out(F.silu(self.into(condition)))[:, None]


_KINDS = {"cross_attention": CrossAttentionAdapter, "offset": OffsetAdapter}


@dataclass
class Guidance:
    """What all sites need in one evaluation, made once by `Adapter.encode`.

    `tokens`: (b, 2, d) per encoder (one if it is shared); `gain`: (b, 1, 1), the factor of every residual.
    """

    tokens: list[torch.Tensor]
    gain: torch.Tensor


class Adapter(nn.Module):
    """All sites of one base. `operations` are the layer classes: `torch.nn`, or ComfyUI's `comfy.ops`."""

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.config = config
        encoders = 1 if config.shared_encoder else len(config.sites)
        self.encoders = nn.ModuleList(GuidanceEncoder(config, operations) for _ in range(encoders))
        build = _KINDS[config.kind]
        self.sites = nn.ModuleDict({site.name: build(site, config, operations) for site in config.sites})
        self._encoder_of = {site.name: i if encoders > 1 else 0 for i, site in enumerate(config.sites)}
        if operations is nn:  # comfy.ops layers hold nothing yet and are only ever loaded into
            for site in self.sites.values():
                zero_init(site.last())

    def encode(self, omega: torch.Tensor, t: torch.Tensor, *, dtype: torch.dtype, strength: float = 1.0) -> Guidance:
        """omega (b,) or (1,), t (b,) -> what the sites need. `strength` multiplies every residual."""
        omega = omega.to(t.device).expand(t.shape[0])
        gain = strength * (omega.float() - 1) if self.config.gain else torch.full_like(omega, strength).float()
        tokens = [encoder(omega, t, dtype) for encoder in self.encoders]
        return Guidance(tokens, gain.to(dtype)[:, None, None])

    def residual(self, name: str, h: torch.Tensor, context: torch.Tensor, guidance: Guidance) -> torch.Tensor:
        """The residual of one site, broadcastable to h: (b, n, w), context (b, m, d) -> (b, n or 1, w)."""
        tokens = guidance.tokens[self._encoder_of[name]]
        return guidance.gain * self.sites[name](h, context, tokens)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """psi: every parameter, by name. There is nothing else to freeze, save or load but the Fourier buffers."""
        return self.named_parameters()

    def parameter_count(self) -> int:
        return sum(parameter.numel() for _, parameter in self.trained())

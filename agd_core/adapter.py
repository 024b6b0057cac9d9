"""The adapters of "Efficient Distillation of Classifier-Free Guidance using Adapters" (arXiv 2503.07274).

At each cross-attention site of the frozen base the output becomes `attn2(h) + g_psi(h, omega, t, c)`, with `h` the
normalised input of that attention. `psi` are the only trained parameters.

What depends on (omega, t, c) alone is computed for all sites together, once per evaluation (`Adapter.prepare`); what
is left at a site is its query, its attention and its output (`Adapter.add`).

Shapes: b rows, n image tokens, m prompt tokens, d their channels (`context_dim`), w channels of a site, H `hidden`,
S sites, E encoders of (omega, t): 1, or S if every site has its own.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from .config import AdapterConfig
from .mixed_precision import MixedPrecision

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
    """Queries from `h`, keys and values from [omega token, t token, prompt tokens]; the output starts at zero.

    The keys and values of all sites come from one matrix, so that they cost one product per evaluation.
    """

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.count, self.prompt_tokens = len(config.sites), config.prompt_tokens
        self.to_kv = operations.Linear(config.context_dim, self.count * 2 * config.hidden, bias=False)
        self.to_q = nn.ModuleDict({s.name: operations.Linear(s.width, config.hidden, bias=False) for s in config.sites})
        self.to_out = nn.ModuleDict({s.name: operations.Linear(config.hidden, s.width) for s in config.sites})

    def prepare(self, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """tokens (b, E, 2, d), context (b, m, d) -> keys and values (S, 2, b, heads, 2 r + m, H / heads).

        Where a prompt shares a batch with a longer one, ComfyUI pads it by repetition, which plain attention does
        not notice. The omega and t tokens are repeated as often (r), so this attention doesn't either.
        """
        E, r = tokens.shape[1], max(1, context.shape[1] // self.prompt_tokens)
        tokens = repeat(tokens, "b e k d -> b (r e k) d", r=r)
        kv = self.to_kv(torch.cat([tokens, context], dim=1))
        kv = rearrange(kv, "b n (s p h d) -> s p b h n d", s=self.count, p=2, h=HEADS)
        if E == 1:
            return kv
        # Of the tokens each site attends to its own only.
        guidance, prompt = kv.split([tokens.shape[1], context.shape[1]], dim=-2)
        own = torch.stack([g.unflatten(-2, (r, E, 2))[..., site, :, :] for site, g in enumerate(guidance)])
        return torch.cat([own.flatten(-3, -2), prompt], dim=-2)

    def forward(self, name: str, h: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """A site's h (b, n, w) and its keys and values (2, b, heads, 2 r + m, H / heads) -> (b, n, w)."""
        q = rearrange(self.to_q[name](h), "b n (h d) -> b h n d", h=HEADS)
        out = F.scaled_dot_product_attention(q, kv[0], kv[1])
        return self.to_out[name](rearrange(out, "b h n d -> b n (h d)"))


class OffsetAdapter(nn.Module):
    """One vector from (omega, t, pooled condition), added to every token. The pooled condition is the tokens' mean."""

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.count, d = len(config.sites), config.context_dim
        # One layer over [omega token, t token, pooled condition], in two parts: the first may differ from site to site.
        self.from_tokens = operations.Linear(2 * d, self.count * config.hidden)
        self.from_pooled = operations.Linear(d, self.count * config.hidden, bias=False)
        self.to_out = nn.ModuleDict({s.name: operations.Linear(config.hidden, s.width) for s in config.sites})

    def prepare(self, tokens: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """tokens (b, E, 2, d), context (b, m, d) -> hidden activations (S, b, 1, H)."""
        E = tokens.shape[1]
        hidden = rearrange(self.from_tokens(tokens.flatten(2)), "b e (s h) -> s b e h", s=self.count)
        if E > 1:
            hidden = torch.stack([own[:, site, None] for site, own in enumerate(hidden)])
        pooled = self.from_pooled(context.mean(dim=1, keepdim=True))
        return F.silu(hidden + rearrange(pooled, "b n (s h) -> s b n h", s=self.count))

    def forward(self, name: str, h: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """A site's h (b, n, w) and its hidden activations (b, 1, H) -> (b, 1, w), the same for all tokens."""
        return self.to_out[name](hidden)


_KINDS = {"cross_attention": CrossAttentionAdapter, "offset": OffsetAdapter}


@dataclass
class Prepared:
    """What an evaluation's sites share, made by `Adapter.prepare`.

    `tokens`: (b, E, 2, d) of omega and t; `gain`: (b, 1, 1), the factor of every residual; `context`: the prompt that
    `shared`, the kind's own part, was made for.
    """

    tokens: torch.Tensor
    gain: torch.Tensor
    context: torch.Tensor
    shared: torch.Tensor


class Adapter(nn.Module):
    """All sites of one base. `operations` are the layers' classes: torch's, `MixedPrecision` or ComfyUI's."""

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__()
        self.config = config
        count = 1 if config.shared_encoder else len(config.sites)
        self.encoders = nn.ModuleList(GuidanceEncoder(config, operations) for _ in range(count))
        self.sites = _KINDS[config.kind](config, operations)
        # Not trained: the mean prompt token of the unconditional, to tell another negative prompt from it.
        self.register_buffer("unconditional", torch.zeros(config.context_dim))
        self._index = {site.name: index for index, site in enumerate(config.sites)}
        if operations in (nn, MixedPrecision):  # comfy.ops layers hold nothing yet and are only ever loaded into
            zero_init(self.sites.to_out)

    def prepare(
        self, omega: torch.Tensor, t: torch.Tensor, context: torch.Tensor, *, dtype: torch.dtype, strength=1.0
    ) -> Prepared:
        """omega (b,) or (1,), t (b,), context (b, m, d) -> what the sites need. `strength` multiplies the residuals.

        Without the gain omega = 1 would not be the base itself, so residuals are dropped there.
        """
        omega = omega.to(t.device).expand(t.shape[0]).float()
        gain = strength * (omega - 1 if self.config.gain else (omega != 1).float())
        tokens = torch.stack([encoder(omega, t, dtype) for encoder in self.encoders], dim=1)
        return Prepared(tokens, gain.to(dtype)[:, None, None], context, self.sites.prepare(tokens, context))

    def add(
        self, name: str, out: torch.Tensor, h: torch.Tensor, context: torch.Tensor, prepared: Prepared
    ) -> torch.Tensor:
        """A site's attention output `out` (b, n, w) with its residual: h (b, n, w), context (b, m, d) -> (b, n, w)."""
        if context is not prepared.context:  # another patch gives this site, or all from here on, another prompt
            prepared.context, prepared.shared = context, self.sites.prepare(prepared.tokens, context)
        residual = self.sites(name, h, prepared.shared[self._index[name]])
        return torch.addcmul(out, prepared.gain, residual)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """psi: every parameter, by name. There is nothing else to freeze, save or load but the buffers."""
        return self.named_parameters()

    def last(self) -> Iterable[nn.Module]:
        """The layers that a new adapter starts at zero, one per site."""
        return self.sites.to_out.values()

    def parameter_count(self) -> int:
        return sum(parameter.numel() for _, parameter in self.trained())

"""The authors' other adapter, the paper's offset: one vector for all tokens.

    c = g(1000 omega) + tt + pp                  pp of the mean of the prompt's tokens
    out = attn2(h) + W5 LN(relu(W4 c + b4)) + b5

g, with its other LayerNorm, tt and pp as in paper.py. Shapes: as there, and n image tokens, w channels of a layer.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..config import AdapterConfig
from ..layers import Guidance, zero_init
from .paper import RELU_GAIN, PaperAdapter, PaperConfig, ReluPerLayer


class PaperAdditiveConfig(PaperConfig):
    name = "paper_additive"


class PaperAdditiveAdapter(PaperAdapter):
    """A new one adds exactly nothing, as theirs with `zero_init`."""

    Config = PaperAdditiveConfig
    omega_factor = 1000.0  # so that omega is on the scale of timesteps
    normed = True

    def __init__(self, config: AdapterConfig, operations=nn):
        super().__init__(config, operations)
        assert isinstance(config.kind, PaperAdditiveConfig)
        H = config.kind.hidden
        self.hidden = ReluPerLayer(self.layer_count, H, H, normed=True)
        self.to_out = nn.ModuleDict({each.name: operations.Linear(H, each.width) for each in config.layers})

    def init_weights(self) -> None:
        super().init_weights()
        self.hidden.linear.init_xavier(RELU_GAIN)
        zero_init(self.to_out)

    def zero_initialised(self) -> Iterable[nn.Module]:
        return self.to_out.values()

    def prepare(self, guidance: Guidance, context: torch.Tensor) -> torch.Tensor:
        """context (b, m, d) -> hidden activations (S, b, 1, H)."""
        c, time = self.embed_omega(guidance), self.embed_time(guidance)  # (S, b, H)
        if time is not None:
            c = c + time
        if self.from_prompt is not None:
            c = c + self.from_prompt(context.to(guidance.dtype).mean(dim=1))
        return self.hidden(c)[:, :, None]

    def after_attention(self, name: str, h: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        """A layer's h (b, n, w), and its hidden activations (b, 1, H) -> (b, 1, w), the same for all tokens."""
        return self.to_out[name](shared)

"""A family that no one has: a small diffusion transformer of its own, to follow docs/architecture.md's recipe with."""

import comfy.model_base
import torch
import torch.nn.functional as F
from torch import nn

from comfyui_agd.examples.toy.model import CONTEXT_DIM, LATENT_CHANNELS, ToyConfig

_WIDTH = 32


class Stripe(nn.Module):
    """Attention of the image to itself and to the prompt, and an MLP."""

    def __init__(self, operations):
        super().__init__()
        self.qkv, self.out = operations.Linear(_WIDTH, 3 * _WIDTH), operations.Linear(_WIDTH, _WIDTH)
        self.mlp = nn.Sequential(operations.Linear(_WIDTH, 64), nn.SiLU(), operations.Linear(64, _WIDTH))

    def forward(self, h, text):
        q, k, v = self.qkv(torch.cat([h, text], dim=1)).chunk(3, dim=-1)
        h = h + self.out(F.scaled_dot_product_attention(q[:, : h.shape[1]], k, v))
        return h + self.mlp(h)


class Stripes(nn.Module):
    """The network: it runs none of ComfyUI's hooks."""

    def __init__(self, operations=nn, dtype=None, **unused):
        super().__init__()
        self.dtype = dtype
        self.enter, self.leave = operations.Linear(LATENT_CHANNELS, _WIDTH), operations.Linear(_WIDTH, LATENT_CHANNELS)
        self.text, self.time = operations.Linear(CONTEXT_DIM, _WIDTH), operations.Linear(1, _WIDTH)
        self.stripes = nn.ModuleList(Stripe(operations) for _ in range(2))

    def forward(self, x, timesteps, context=None, **unused):
        h = self.enter(x.flatten(2).mT) + self.time(timesteps[:, None].to(x) / 1000)[:, None]
        text = 4 * F.layer_norm(self.text(context), (_WIDTH,))  # louder than at random, so that guidance is seen
        for stripe in self.stripes:
            h = stripe(h, text)
        return self.leave(h).mT.reshape(x.shape)


class MadeUp(ToyConfig):
    """ComfyUI's class for the family, by which a row names it; the toy's latents and text encoder."""

    def get_model(self, state_dict, prefix="", device=None):
        return comfy.model_base.BaseModel(self, device=device, unet_model=Stripes)

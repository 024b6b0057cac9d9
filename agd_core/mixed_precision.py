"""Layers for training an adapter on a base that computes in half precision."""

import torch
import torch.nn.functional as F
from torch import nn


class CastLinear(nn.Linear):
    """Its parameters and their gradients are fp32; each use casts them to the dtype of its input.

    Small updates of an optimiser would be lost in half precision. The result is in the input's dtype.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class MixedPrecision:
    """`Adapter`'s `operations` for training."""

    Linear = CastLinear

"""Randomness by seeds."""

import torch


def generator_of(seed: int) -> torch.Generator:
    """On the CPU. torch takes seeds below 2^64; a larger one, a sum or product of ours, counts from 0 again."""
    return torch.Generator().manual_seed(seed % 2**64)

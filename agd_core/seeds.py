"""Random generators by the seed that users choose, which ComfyUI draws from 0 to 2^64 - 1."""

import torch

LARGEST_SEED = 2**64 - 1  # that torch takes, too


def seeded_generator(seed: int, stream: int | None = None) -> torch.Generator:
    """On the CPU. `stream`: a small number, for a generator of its own beside others of the same seed.

    What is past `LARGEST_SEED` begins again at 0. Of any number torch goes by the lower 32 bits, here as in ComfyUI.
    """
    number = seed if stream is None else seed * 1_000_003 + stream
    return torch.Generator().manual_seed(number % (LARGEST_SEED + 1))

"""The learning rate's schedule."""

import math

from .config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to 0 at the end. `step` counts from 0."""
    rising = max(1, round(config.warmup * config.iterations))
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, config.iterations - rising)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

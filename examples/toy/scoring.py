"""How well pictures show what their captions say, and how far they are from real ones, by the committed judge."""

import functools

import comfy.utils
import torch

from . import model as toy
from .judge import Judge, frechet_distance, prompt_accuracy
from .scenes import Scene, draw_scenes, render

REFERENCE_IMAGES = 4096
_ROWS = 256  # pictures that the judge is given at once


class Scorer:
    """The judge with the features of real, held-out pictures."""

    def __init__(self):
        self.judge = Judge().eval().requires_grad_(False)
        self.judge.load_state_dict(comfy.utils.load_torch_file(str(toy.WEIGHTS / "judge.safetensors")))
        self.judge.float()

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """(REFERENCE_IMAGES, 128)."""
        return self.features(render(draw_scenes(REFERENCE_IMAGES, 17, held=True), 17))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, 64, 64) in [0, 1] -> (n, 128)."""
        return torch.cat([self.judge.features(part) for part in images.split(_ROWS)])

    def accuracy(self, images: torch.Tensor, scenes: list[Scene]) -> float:
        return prompt_accuracy(self.judge, images, scenes)

    def frechet(self, images: torch.Tensor) -> float:
        """To real pictures, in the judge's feature space."""
        return frechet_distance(self.features(images), self.reference)

"""The toys by name, and what is different between them; text encoder, autoencoder, captions and judge are the same."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from comfy.model_patcher import ModelPatcher

from .dit import load_dit
from .model import WEIGHTS, load_unet


@dataclass(frozen=True)
class Base:
    """`load`: its MODEL. `scheduler`: KSampler's, that suits its noise levels."""

    name: str
    title: str
    load: Callable[[], ModelPatcher]
    scheduler: str

    @property
    def measured(self) -> Path:
        """What `measure.py` found."""
        return WEIGHTS / f"measured_{self.name}.json"


BASES = {
    base.name: base
    for base in (
        Base("toy", "the toy UNet", load_unet, "normal"),
        Base("toy-dit", "the toy transformer", load_dit, "simple"),
    )
}

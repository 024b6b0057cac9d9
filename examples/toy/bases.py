"""The toys by name, and what is different between them; text encoder, autoencoder, captions and judge are the same."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from .dit import build_dit, load_dit
from .model import WEIGHTS, build_model, load_unet


@dataclass(frozen=True)
class Base:
    """`build`: its network with new weights; `file`: of its own ones; `load`: its MODEL, with them or those of another
    file. `scheduler`: KSampler's, that suits its noise levels."""

    name: str
    title: str
    build: Callable[[], BaseModel]
    file: str
    load: Callable[..., ModelPatcher]
    scheduler: str

    @property
    def measured(self) -> Path:
        """What `measure.py` found."""
        return WEIGHTS / f"measured_{self.name}.json"


BASES = {
    base.name: base
    for base in (
        Base("toy", "the toy UNet", build_model, "unet.safetensors", load_unet, "normal"),
        Base("toy-dit", "the toy transformer", build_dit, "dit.safetensors", load_dit, "simple"),
    )
}

"""What a base family's network is to adapters, their training and their files: the class that a layout derives from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import nn

from ...config import AdapterConfig, AdapterLayer
from ...errors import AGDError
from ...families import Family
from ..guided_step import GuidedStep
from ..prompt import KeysValues

INSTEAD = "Choose 'training-free' in AGD Adapter Loader, which needs no adapter."


class UnsupportedModel(AGDError, ValueError):
    """A model whose structure AGD cannot adapt."""


class Backbone(ABC):
    """One layout of networks. `network`: a model's `diffusion_model`; `family`: its row, for what can't be seen of it.

    `wrappers`: of ComfyUI's, by their type, that `intercept` counts on; `kinds`: of adapters that have a place in these
    networks, all if None; `prompts_pass_blocks`: whether the prompt's tokens go through the blocks beside the image's,
    so that what an attention makes of them depends on all that is before it; `overwrites`: whether blocks overwrite
    what a backward pass needs, or have kernels without one; `compiles`: whether `intercept` has the network compiled
    with a step in it, by the step's `compile_options`. Works on the meta device.
    """

    layout: ClassVar[str]
    kinds: ClassVar[tuple[str, ...] | None] = None
    wrappers: ClassVar[dict[str, Callable]] = {}
    prompts_pass_blocks: ClassVar[bool] = False
    overwrites: ClassVar[bool] = False
    compiles: ClassVar[bool] = False

    def __init__(self, network: nn.Module, family: Family | None = None):
        self.network, self.family = network, family

    @classmethod
    def recognises(cls, network: nn.Module) -> bool:
        """Whether a network of a family without a row is laid out like this."""
        return False

    @classmethod
    def fits(cls, network: nn.Module, family: Family) -> bool:
        """Whether a network is laid out as the family's row says."""
        return cls.recognises(network)

    @abstractmethod
    def layers(self) -> tuple[AdapterLayer, ...]:
        """The adapter layers in the order of evaluation. Raises `UnsupportedModel` where there are none."""

    def block(self, layer: AdapterLayer) -> nn.Module:
        """The block of an adapter layer."""
        return self.network.get_submodule(layer.path)

    def blocks(self) -> dict[str, nn.Module]:
        """Every adapter layer's block, by its name."""
        return {layer.name: self.block(layer) for layer in self.layers()}

    def checkpointed_blocks(self) -> list[nn.Module]:
        """The blocks of which a training step keeps only what they were given, to compute the rest again."""
        return list(self.blocks().values())

    def block_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A block's keyword arguments, so that they stay as they are now while the network's evaluation goes on.

        Networks write the place of each block into their `transformer_options`.
        """
        if "transformer_options" not in kwargs:
            return kwargs
        return {**kwargs, "transformer_options": dict(kwargs["transformer_options"])}

    def check_kind(self, config: AdapterConfig) -> None:
        """Raises `UnsupportedModel` where an adapter works in a way that these networks leave no place for."""
        if config.kind.vector_width and self.vector() != config.vector:
            raise UnsupportedModel(
                "This model has no vector of the timestep that the adapter can change: train one with vector 0. "
                f"Details: it is for one of {config.vector} channels, this {type(self.network).__name__} has "
                f"{self.vector()}."
            )
        if config.kind.uses_time and self.time_channels() != config.time_channels:
            raise UnsupportedModel(
                "This adapter knows the timestep by the base's own embedding, and this model has another one: choose "
                f"an adapter that was made for such a model. Details: it is for one of {config.time_channels} "
                f"channels, this {type(self.network).__name__} has {self.time_channels()}."
            )
        if self.kinds is not None and config.kind.name not in self.kinds:
            raise UnsupportedModel(
                f"An adapter of kind {config.kind.name} has no place in this model: train one of kind "
                f"{' or '.join(self.kinds)}. {INSTEAD} Details: this model is a {type(self.network).__name__}, of the "
                f"layout {self.layout}."
            )

    @abstractmethod
    def intercept(self, step: GuidedStep) -> AbstractContextManager[dict[str, Any]]:
        """Inside, the network's evaluation is guided by `step`: gives further arguments for it, by name."""

    @abstractmethod
    def keys_values(
        self, model: Any, arguments: dict[str, Any], x: torch.Tensor, step: GuidedStep
    ) -> Iterator[tuple[str, KeysValues]]:
        """By adapter layer, what the attention to a prompt makes of it, for latents like x (b, c, h, w).

        `model`: ComfyUI's BaseModel; `arguments`: of `apply_model`, with that prompt; `step`: the adapters at work.
        """

    def vector(self) -> int:
        """Channels of the vector of the timestep that adapters can add to; 0: it is left alone."""
        return 0

    def time_channels(self) -> int:
        """Channels of the network's own embedding of the timestep that adapters can know; 0: there is none."""
        return 0

    def runs_compiled(self, step: GuidedStep) -> bool:
        """Whether the network may run with this step as it was compiled without: torch.compile doesn't see hooks come
        and go."""
        return not step.changes_linears

    def timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """The network's own timesteps (b,) on a scale from 0 to 1000, which adapters know."""
        return t

    def condition_of(self, model: Any, cond: dict) -> dict:
        """A text encoder's condition, as it has to be kept for training; `model`: ComfyUI's BaseModel."""
        return cond

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The latents that one of training, x (b, c, h, w), stands for: itself, but for models of several."""
        return [x]

    def join(self, latents: list[torch.Tensor]) -> torch.Tensor:
        """The opposite of `split`."""
        (latent,) = latents
        return latent

    def latent_shape(self, latent_format, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """Of training's latent of a picture of width x height pixels: (c, h, w); of video, with so many `frames`,
        (c, t, h, w).

        `latent_format`: ComfyUI's.
        """
        if frames > 1 and latent_format.latent_dimensions == 2:
            raise UnsupportedModel(f"This model makes pictures, not videos, so there can't be {frames} frames.")
        factor = latent_format.spacial_downscale_ratio
        time = [frames] * (latent_format.latent_dimensions - 2)
        return (latent_format.latent_channels, *time, height // factor, width // factor)

    def prediction_unit(self, sigma: torch.Tensor) -> torch.Tensor:
        """(b,): an error of 1 in what the loss is about is an error of so much in the denoised prediction.

        That is eps for the usual diffusion models, v-prediction included, and the velocity of a flow model.
        """
        return sigma

    def first_and_last(self) -> tuple[str, str]:
        """The names of the first and of the last layer's weights, by which checkpoints are told."""
        (first, _), *_, (last, _) = self.network.named_parameters()
        return first, last

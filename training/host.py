"""What the trainer needs of whatever runs the base model. `agd_core.comfyui.host` is the one implementation."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ..agd_core.adapter import Adapter
from ..agd_core.config import BaseInfo

Condition = Any  # one encoded prompt, opaque to the trainer


class Host(Protocol):
    """A frozen base model. Denoisers follow one contract: x (b, c, h, w), sigma (b,) -> denoised (b, c, h, w)."""

    base: BaseInfo
    device: torch.device

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]: ...

    def encode(self, prompts: list[str], shape: tuple[int, int, int], kind: str = ...) -> list[Condition]: ...

    def context(self, condition: Condition) -> torch.Tensor: ...

    def session(self) -> AbstractContextManager[None]: ...

    def sigmas(self, scheduler: str, steps: int) -> torch.Tensor: ...

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor: ...

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, conditions: Sequence[Condition]) -> torch.Tensor: ...

    def student(
        self,
        adapter: Adapter,
        x: torch.Tensor,
        sigma: torch.Tensor,
        conditions: Sequence[Condition],
        omega: torch.Tensor,
    ) -> torch.Tensor: ...

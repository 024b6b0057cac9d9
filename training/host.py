"""What the trainer needs of whatever runs the base model. `agd_core.comfyui.model.host` is the one implementation."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from PIL import Image

from ..agd_core.adapter import Adapter
from ..agd_core.config import AdapterConfig, BaseInfo

Prompt = Any  # one encoded prompt, opaque to the trainer


class Costs(Protocol):
    """What one evaluation takes: bytes at its peak above what was there before, and floating-point operations."""

    peak_bytes: int
    flops: int


class Host(Protocol):
    """A frozen base model. Denoisers follow one contract: x (b, c, h, w), sigma (b,) -> denoised (b, c, h, w)."""

    base: BaseInfo
    device: torch.device
    computes_in: torch.dtype
    teacher: dict  # what else than the base's own weights the teacher is made of: LoRAs and other patches

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]: ...

    def check_schedulers(self, names: Sequence[str]) -> None: ...

    def encode(self, prompts: list[str], kind: str = ...) -> list[Prompt]: ...

    def release_text_encoder(self) -> None: ...

    def context(self, prompt: Prompt) -> torch.Tensor: ...

    def session(self, *, checkpointing: bool = ..., memory: int = ...) -> AbstractContextManager[None]: ...

    def sigmas(self, scheduler: str, steps: int) -> torch.Tensor: ...

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor: ...

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor: ...

    def student(
        self,
        adapter: Adapter,
        x: torch.Tensor,
        sigma: torch.Tensor,
        prompts: Sequence[Prompt],
        negative: Sequence[Prompt],
        omega: torch.Tensor,
    ) -> torch.Tensor: ...

    def picture(self, latent: torch.Tensor) -> Image.Image: ...

    def out_of_memory(self, error: BaseException) -> bool: ...

    def free_unused_memory(self) -> None: ...

    def memory_used(self) -> int: ...

    def memory_free(self) -> int | None: ...

    def base_bytes(self) -> int: ...

    def largest_block_bytes(self) -> int: ...

    def trace_student(
        self, config: AdapterConfig, shape: tuple[int, int, int], rows: int, checkpointing: bool
    ) -> Costs: ...

    def trace_teacher(self, shape: tuple[int, int, int], rows: int) -> Costs: ...

    def matmul_rate(self) -> float: ...


_ENCODED = 16  # prompts between two reports


def encode(host: Host, prompts: Sequence[str], kind: str, progress: Callable[[int, int], None]) -> list[Prompt]:
    """Each prompt encoded, equal ones once. `kind` is "positive" or "negative"; `progress` is told of distinct ones."""
    encoded, distinct = [], list(dict.fromkeys(prompts))
    for i in range(0, len(distinct), _ENCODED):
        encoded += host.encode(distinct[i : i + _ENCODED], kind)
        progress(len(encoded), len(distinct))
    found = dict(zip(distinct, encoded, strict=True))
    return [found[prompt] for prompt in prompts]

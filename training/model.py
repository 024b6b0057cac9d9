"""A frozen base as the trainer sees it: it denoises, encodes prompts and takes memory.

`agd_core.comfyui.model` implements it for ComfyUI's models.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from ..agd_core.adapter import Adapter
from ..agd_core.config import AdapterConfig, BaseInfo

Prompt = Any  # one encoded prompt, opaque to the trainer but for its `text`
Shape = tuple[int, ...]  # of a latent without its batch: channels first, height and width last
ProgressCallback = Callable[[int, int], None]  # called with how many are done, and of how many


def no_progress(done: int, total: int) -> None:
    """For what nobody watches."""


def part_of(progress: ProgressCallback, before: int, total: int) -> ProgressCallback:
    """For a part of what `progress` counts to `total`, of which `before` are done before it."""
    return lambda done, _: progress(before + done, total)


class Denoiser(Protocol):
    """Denoisers follow one contract: x (b, c, h, w), sigma (b,) -> denoised (b, c, h, w)."""

    device: torch.device

    @property
    def is_flow(self) -> bool:
        """Whether x is (1 - sigma) x_0 + sigma noise, as in flow matching, instead of x_0 + sigma noise."""

    @property
    def computes_in(self) -> torch.dtype: ...

    def latent_shape(self, width: int, height: int) -> Shape: ...

    def check_adapter(self, config: AdapterConfig) -> None:
        """Raises `ValueError` where the base has no place for such an adapter."""

    def check_schedulers(self, names: Sequence[str]) -> None:
        """Raises `ValueError` for one that there isn't."""

    def session(self, *, checkpointing: bool = ..., memory: int = ..., work: int = ...) -> AbstractContextManager[None]:
        """Inside, the base is loaded and ready for gradients; `memory` bytes of the device are left free, and by what
        is loaded beside the base at least `work`."""

    def sigmas(self, scheduler: str, steps: int) -> torch.Tensor:
        """(steps + 1,) noise levels, the last one 0."""

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Unit noise (b, c, h, w) brought to sigma (b,)."""

    def prediction_unit(self, sigma: torch.Tensor) -> torch.Tensor:
        """The error of the denoised prediction that an error of 1 in what the base predicts makes, (b,) by sigma."""

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """f(x, sigma, c), without gradients."""

    def student(
        self,
        adapter: Adapter,
        x: torch.Tensor,
        sigma: torch.Tensor,
        prompts: Sequence[Prompt],
        negative: Sequence[Prompt],
        omega: torch.Tensor,
    ) -> torch.Tensor:
        """f_psi(x, sigma, c, omega, c_neg), with gradients. omega: (b,)."""


class TextEncoder(Protocol):
    def encode(self, prompts: Sequence[str], kind: str = ...) -> list[Prompt]:
        """`kind` is "positive" or "negative"."""

    def length(self, prompt: str) -> int:
        """In tokens, to compare prompts by: a longer one is encoded longer. Takes no evaluation.

        Raises `ValueError` for a prompt that can't be encoded.
        """

    def bytes_of(self, prompt: Prompt) -> int:
        """What an encoded prompt takes of system memory."""

    def release(self) -> None:
        """No prompts will be encoded any more."""

    def context(self, prompt: Prompt) -> torch.Tensor:
        """The prompt tokens (m, d) of an encoded prompt."""


class Cost(Protocol):
    """What one evaluation takes: bytes at its peak above what was there before, and floating-point operations."""

    @property
    def peak_bytes(self) -> int: ...

    @property
    def flops(self) -> int: ...


class DeviceMemory(Protocol):
    def is_out_of_memory(self, error: BaseException) -> bool: ...

    def free_unused(self) -> None: ...

    def used(self) -> int:
        """The most bytes so far."""

    def available(self) -> int | None:
        """The bytes that training could have; None is no limit."""

    def system_available(self) -> int:
        """The bytes of system memory that are free."""

    def base_bytes(self) -> int: ...

    def other_expert_bytes(self) -> int:
        """Of a model of two experts, the weights of the one that isn't trained; 0 where there is none."""

    def other_expert_bytes_on_device(self, free: int) -> int:
        """Of these, what is on a device with `free` bytes beside the base and a step."""

    def largest_block_bytes(self) -> int:
        """Of the base, or of the other expert, what has to be on the device at a time."""

    def trace_student(
        self, config: AdapterConfig, shape: Shape, rows: int, checkpointing: bool, prompt: Prompt
    ) -> Cost:
        """What the student's forward and backward pass take for `rows` latents, each with that prompt and it as the
        negative one; nothing is computed."""

    def trace_base(self, shape: Shape, rows: int, prompt: Prompt) -> Cost: ...

    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product; 0 where it is unknown."""


class Model(Protocol):
    """`base_patches`: what the base is made of besides its own weights, LoRAs and other patches, as JSON data."""

    base: BaseInfo
    base_patches: dict[str, Any]

    def made_of(self) -> dict[str, str]:
        """What training depends on besides the base's own weights, each by a short name: LoRAs, the other expert."""

    @property
    def denoiser(self) -> Denoiser: ...

    @property
    def text_encoder(self) -> TextEncoder: ...

    @property
    def memory(self) -> DeviceMemory: ...

    def picture(self, latent: torch.Tensor) -> Image.Image:
        """A latent (1, c, h, w) as the sampler leaves it, as a picture."""


@dataclass(frozen=True)
class EncodedPrompts:
    """What batches refer to by number."""

    positive: Sequence[Prompt]
    negative: Sequence[Prompt]

    def of_rows(self, positive: torch.Tensor, negative: torch.Tensor) -> tuple[list[Prompt], list[Prompt]]:
        """The prompts and negative prompts with these numbers, (b,) each."""
        return [self.positive[i] for i in positive.tolist()], [self.negative[i] for i in negative.tolist()]


def encode(
    text_encoder: TextEncoder, lists: Sequence[tuple[str, Sequence[str]]], progress: ProgressCallback
) -> list[list[Prompt]]:
    """Lists of prompts encoded, each with its kind, "positive" or "negative"; equal ones once, as `progress` counts."""
    distinct = dict.fromkeys((kind, prompt) for kind, prompts in lists for prompt in prompts)
    found = dict[tuple[str, str], Prompt]()
    progress(0, len(distinct))
    for kind, prompt in distinct:
        (found[kind, prompt],) = text_encoder.encode([prompt], kind)
        progress(len(found), len(distinct))
    return [[found[kind, prompt] for prompt in prompts] for kind, prompts in lists]

"""The memory that a ComfyUI MODEL is trained in: what there is, and what evaluations take of it."""

import gc
import time
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import psutil
import torch

from ...adapter import Adapter
from ...config import AdapterConfig
from . import tracing
from .activation_checkpointing import largest_block_bytes
from .denoiser import ComfyDenoiser, options_of, with_adapter
from .experts import TwoExperts
from .loading import loaded_models
from .text_encoder import EncodedPrompt


class ComfyMemory:
    """Implements `training.model.DeviceMemory`."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher, denoiser: ComfyDenoiser):
        self._model, self._denoiser = model, denoiser
        self._other = denoiser.other if isinstance(denoiser, TwoExperts) else None
        self.device = denoiser.device

    def is_out_of_memory(self, error: BaseException) -> bool:
        if _is_oom(error):
            return True
        # As devices other than CUDA's say it, and CUDA itself where another library has asked.
        return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()

    def free_unused(self) -> None:
        gc.collect()
        comfy.model_management.soft_empty_cache()

    def used(self) -> int:
        """The most bytes of the GPU's memory that were in use so far; on a CPU what the process has now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def available(self) -> int | None:
        """The bytes that training could have on the device, with every other model moved out; None on a CPU."""
        if self.device.type == "cpu":
            return None
        movable = sum(model.loaded_size() for model in loaded_models() if model.load_device == self.device)
        return comfy.model_management.get_free_memory(self.device) + movable

    def system_available(self) -> int:
        """The bytes of system memory that are free."""
        return psutil.virtual_memory().available

    def base_bytes(self) -> int:
        """What the base's weights take."""
        return self._model.model_size()

    def other_expert_bytes(self) -> int:
        """What the other expert's weights take; 0 where there is none."""
        return 0 if self._other is None else self._other.base_bytes()

    def other_expert_bytes_on_device(self, free: int) -> int:
        """Of these, what is on a device with `free` bytes beside the base and a step."""
        return 0 if self._other is None else self._other.bytes_on_device(free)

    def largest_block_bytes(self) -> int:
        """What the largest part of the base, or of the other expert, takes that has to be on the device at a time."""
        return max(largest_block_bytes(denoiser.backbone) for denoiser in self._experts)

    @property
    def _experts(self) -> list[ComfyDenoiser]:
        return [self._denoiser, *([] if self._other is None else [self._other])]

    def trace_student(
        self, config: AdapterConfig, shape: tuple[int, ...], rows: int, checkpointing: bool, prompt: EncodedPrompt
    ) -> tracing.Traced:
        """What the student's forward and backward pass take for `rows` latents of `shape`; nothing is computed.

        `prompt`: of all rows, and the negative one too.
        """
        self._denoiser.check_adapter(config)
        conds, options = self._denoiser.conditions([prompt] * rows, (rows, *shape)), options_of(self._model)

        def evaluate(adapter: Adapter, x: torch.Tensor, sigma: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
            return self._denoiser.evaluate(x, sigma, conds, with_adapter(options, adapter, omega, conds, conds))

        return tracing.student(self._model.model, evaluate, config, shape, rows, checkpointing=checkpointing)

    def trace_base(self, shape: tuple[int, ...], rows: int, prompt: EncodedPrompt) -> tracing.Traced:
        """As `trace_student`, for an evaluation of the base: of two experts by the one that takes more."""
        found = [self._trace(denoiser, shape, rows, prompt) for denoiser in self._experts]
        return replace(max(found, key=lambda each: each.flops), peak_bytes=max(each.peak_bytes for each in found))

    def _trace(
        self, denoiser: ComfyDenoiser, shape: tuple[int, ...], rows: int, prompt: EncodedPrompt
    ) -> tracing.Traced:
        conds, options = denoiser.conditions([prompt] * rows, (rows, *shape)), options_of(denoiser.model)

        def evaluate(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return denoiser.evaluate(x, sigma, conds, options)

        return tracing.base(denoiser.model.model, evaluate, shape, rows)

    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product in the dtype that the base computes in."""
        size = 1024 if self.device.type == "cpu" else 4096
        a = torch.ones(size, size, dtype=self._denoiser.computes_in, device=self.device)
        seconds, products = 0.0, 0
        _wait_for(a @ a)
        while seconds < 0.2:
            start = time.perf_counter()
            _wait_for(a @ a)
            seconds, products = seconds + time.perf_counter() - start, products + 1
        return products * 2 * size**3 / seconds


def _is_oom(error: BaseException) -> bool:
    """By ComfyUI's own test, which clears the device's error as well; older releases have none."""
    is_oom = getattr(comfy.model_management, "is_oom", None)
    return isinstance(error, torch.cuda.OutOfMemoryError) if is_oom is None else is_oom(error)


def _wait_for(result: torch.Tensor) -> None:
    """Until the device has computed `result`."""
    result[0, 0].item()

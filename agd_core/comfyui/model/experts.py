"""A model of two experts, one for the noisy and one for the clean part of a trajectory (Wan 2.2 14B).

An adapter is trained for one of them, on the states that it sees: reached through the other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...adapter import Adapter
from ...guidance import per_row
from .denoiser import ComfyDenoiser, in_order
from .loading import loaded_models
from .text_encoder import EncodedPrompt


class OtherExpert(ComfyDenoiser):
    """Takes of the device what the trained expert leaves free. The rest of its weights are fetched as it runs."""

    def base_bytes(self) -> int:
        """What its weights take."""
        return self.model.model_size()

    def bytes_on_device(self, free: int) -> int:
        """Of these, what is on a device with `free` bytes beside the trained expert and a step."""
        return max(0, min(self.base_bytes(), _room(free)))

    @contextmanager
    def _ready(self, checkpointing: bool, memory: int, work: int) -> Iterator[None]:
        """`memory`: bytes of the device to leave free."""
        try:
            with super()._ready(checkpointing, memory, work):
                yield
        finally:
            if not any(each.is_clone(self.model) for each in loaded_models()):
                self.model.detach()

    def _load(self, memory: int) -> None:
        if getattr(self.model, "is_dynamic", lambda: False)():  # ComfyUI's dynamic VRAM makes room as models run
            super()._load(memory)
            return
        # Not by `load_models_gpu`, which makes room for all of one model by moving out all of the other: that one
        # couldn't be evaluated then.
        room = _room(comfy.model_management.get_free_memory(self.device) - memory)
        self.model.model_patches_to(self.device)
        self.model.model_patches_to(self.model.model_dtype())
        # With nothing loaded, it is made ready to fetch its weights by being given some room.
        self.model.partially_load(self.device, max(room, 0.1 - self.model.loaded_size()))


def _room(free: int) -> int:
    """For weights, of `free` bytes: ComfyUI wants some for itself."""
    return free - comfy.model_management.minimum_inference_memory()


class TwoExperts(ComfyDenoiser):
    """Implements `training.model.Denoiser`: the trained expert, and the `other` where a noise level isn't its own."""

    def __init__(
        self,
        model: ModelPatcher,
        other: ModelPatcher,
        is_own: Callable[[torch.Tensor], torch.Tensor],
        autocast: torch.dtype | None = None,
        frames: int = 1,
    ):
        """`is_own`: sigma (b,) -> bool (b,), which noise levels are `model`'s."""
        super().__init__(model, autocast, frames)
        self.other, self.is_own = OtherExpert(other, autocast), is_own

    @contextmanager
    def _ready(self, checkpointing: bool, memory: int, work: int) -> Iterator[None]:
        with super()._ready(checkpointing, memory, work), self.other._ready(False, max(memory, work), 0):
            yield

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[EncodedPrompt]) -> torch.Tensor:
        own, parts = super().denoise, {}
        for rows, is_own in self._divided(sigma):
            denoise = own if is_own else self.other.denoise
            parts[tuple(rows)] = denoise(x[rows], sigma[rows], [prompts[row] for row in rows])
        return in_order(parts)

    def student(
        self,
        adapter: Adapter,
        x: torch.Tensor,
        sigma: torch.Tensor,
        prompts: Sequence[EncodedPrompt],
        negative: Sequence[EncodedPrompt],
        omega: torch.Tensor,
    ) -> torch.Tensor:
        """At the other's noise levels, where previews come by, that is CFG by the other."""
        own, parts = super().student, {}
        for rows, is_own in self._divided(sigma):
            what = x[rows], sigma[rows]
            wanted, unwanted = ([each[row] for row in rows] for each in (prompts, negative))
            if is_own:
                parts[tuple(rows)] = own(adapter, *what, wanted, unwanted, omega[rows])
            else:
                cond, uncond = (self.other.denoise(*what, each) for each in (wanted, unwanted))
                parts[tuple(rows)] = uncond + per_row(omega[rows].to(cond), cond) * (cond - uncond)
        return in_order(parts)

    def _divided(self, sigma: torch.Tensor) -> Iterator[tuple[list[int], bool]]:
        """The rows (b,) of either expert, and whether it is the trained one."""
        own = self.is_own(sigma)
        for mask, is_own in ((own, True), (~own, False)):
            if rows := mask.nonzero()[:, 0].tolist():
                yield rows, is_own

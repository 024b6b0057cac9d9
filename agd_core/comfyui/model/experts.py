"""A model of two experts, one for the noisy and one for the clean part of a trajectory (Wan 2.2 14B).

An adapter is trained for one of them, on the states that it sees: reached through the other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from comfy.model_patcher import ModelPatcher

from ...adapter import Adapter
from ...guidance import per_row
from .denoiser import ComfyDenoiser, in_order
from .text_encoder import EncodedPrompt


class TwoExperts(ComfyDenoiser):
    """Implements `training.model.Denoiser`: the trained expert, and the `other` where a noise level isn't its own."""

    def __init__(
        self,
        model: ModelPatcher,
        other: ModelPatcher,
        is_own: Callable[[torch.Tensor], torch.Tensor],
        autocast: torch.dtype | None = None,
    ):
        """`is_own`: sigma (b,) -> bool (b,), which noise levels are `model`'s."""
        super().__init__(model, autocast)
        self.other, self.is_own = ComfyDenoiser(other, autocast), is_own

    @contextmanager
    def session(self, *, checkpointing: bool = False, memory: int = 0) -> Iterator[None]:
        # The other one first: where there is no room for both, it is the one that goes back to system memory.
        with self.other.session(memory=memory), super().session(checkpointing=checkpointing, memory=memory):
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

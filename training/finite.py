"""NaN and infinity: whose they are, and what helps."""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..agd_core.errors import AGDError
from .model import Denoiser, Prompt

_SHOWN = 60  # characters of a prompt


class BaseNotFinite(AGDError, ArithmeticError):
    """The base itself predicts NaN or infinity, with nothing of ours in it."""


class TargetNotFinite(AGDError, ArithmeticError):
    """What the teacher makes of the base's predictions is NaN or infinite."""


def check_target(target: torch.Tensor, teacher: str, omega_max: float, at: str = "") -> None:
    """`target`: what `teacher` makes of finite predictions, (b, c, h, w). Raises `TargetNotFinite`."""
    if not target.isfinite().all():
        raise TargetNotFinite(
            f"The teacher's guidance ({teacher}) is NaN or infinite{at}, though the model's own predictions are not: "
            f"choose another teacher, or a largest guidance scale (omega_max) below {omega_max:g}."
        )


class Diverged(AGDError, FloatingPointError):
    """The adapter in training is beyond recovery. `step`: the last one that was taken."""

    def __init__(self, what: str, step: int, remedy: str = ""):
        super().__init__(f"The training diverged: {what}.{remedy}")
        self.what, self.step = what, step


def base_prediction(
    denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[Prompt]
) -> torch.Tensor:
    """f(x, sigma, c) on the CPU: x (b, c, h, w), sigma (b,), a prompt each. Raises `BaseNotFinite`."""
    denoised = denoiser.denoise(x, sigma, prompts).cpu()
    finite = denoised.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise BaseNotFinite(_of_base(denoised[row], sigma[row].item(), prompts[row], denoiser.computes_in))
    return denoised


def _of_base(denoised: torch.Tensor, sigma: float, prompt: Prompt, dtype: torch.dtype) -> str:
    found = "NaN" if denoised.isnan().any() else "infinity"
    shown = repr(textwrap.shorten(prompt.text, _SHOWN, placeholder=" ..."))
    return (
        f"The model itself, without any adapter, predicts {found} for the prompt {shown} at noise level {sigma:.4g}, "
        f"computed in {str(dtype).removeprefix('torch.')}: {_remedy(dtype)}"
    )


def _remedy(dtype: torch.dtype) -> str:
    if dtype is torch.float16:
        return (
            "the numbers of fp16 are too small for it. Train with precision bf16 (--precision bf16, or precision in "
            "AGD Train Settings; the same output goes on), or load the model in bf16 or fp32 (--base-dtype, or ComfyUI "
            "started with --bf16-unet or --fp32-unet)."
        )
    return (
        "its file or one of its LoRAs may be damaged. See whether it samples a picture of that prompt, and try it "
        "without LoRAs or in fp32 (--base-dtype fp32, or ComfyUI started with --fp32-unet)."
    )


def non_finite(value: Any, name: str) -> Iterator[str]:
    """The names of what holds NaN or infinity, of tensors and numbers in dicts and lists."""
    if isinstance(value, torch.Tensor):
        wrong = not value.isfinite().all()
    else:
        wrong = isinstance(value, float) and not abs(value) < float("inf")
    if wrong:
        yield name
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in parts:
        yield from non_finite(part, f"{name}.{key}")

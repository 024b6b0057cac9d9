"""A base whose answers are known, for the trainer without ComfyUI: a Gaussian around a mean of each prompt's own."""

import contextlib
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import pytest
import torch
from PIL import Image

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.config import BaseInfo
from comfyui_agd.agd_core.guidance import per_row
from comfyui_agd.tests.support.small import small_layers
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.progress import Progress
from comfyui_agd.training.trainer import Callbacks, Trained

PROMPTS = [
    f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "star", "ring", "cross")
]
CONFIG = TrainConfig(
    iterations=12,
    batch=4,
    pool=3,
    learning_rate=3e-3,
    width=64,
    height=64,
    hidden=8,
    rank=0,
    encoder_width=8,
    steps_min=3,
    steps_max=5,
    reuse=1,
    held_out=2,
    evaluate_every=5,
    preview_every=0,
    save_every=5,
)
RANK = 8  # of a low_rank adapter in `CONFIG`'s size
CHANNELS, TOKENS, CONTEXT, SPREAD = 2, 3, 16, 0.5  # SPREAD: of the data around its mean


def of_kind(kind: str, config: TrainConfig = CONFIG) -> TrainConfig:
    """With a small adapter of that kind."""
    return replace(config, kind=kind, rank=RANK if kind == "low_rank" else config.rank)


def _fixed(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[0] ** 0.5


@dataclass
class AnalyticModel:
    """Implements `training.model.Model`, and is its own denoiser, text encoder and memory.

    `most_rows`: with more of the student's at once it is out of memory.
    """

    most_rows: int = 1000
    base_patches: dict = field(default_factory=dict)
    loras: str = ""
    base: BaseInfo = field(default_factory=lambda: BaseInfo("Analytic", "EPS", small_layers(), {}, "abc"))
    device, computes_in, is_flow = torch.device("cpu"), torch.float32, False

    def __post_init__(self):
        self.to_mean = 2 * _fixed(CONTEXT, CHANNELS, seed=1)
        self.to_h = {layer.name: _fixed(CHANNELS, layer.width, seed=layer.width) for layer in self.base.layers}
        self.from_h = {layer.name: _fixed(layer.width, CHANNELS, seed=layer.width + 1) for layer in self.base.layers}
        self.student_rows: list[int] = []
        self.base_rows: list[int] = []

    @property
    def denoiser(self) -> "AnalyticModel":
        return self

    text_encoder = memory = denoiser

    def made_of(self) -> dict[str, str]:
        return {"loras": self.loras}

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        return CHANNELS, height // 8, width // 8

    def check_adapter(self, config) -> None:
        pass

    def check_schedulers(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in ("normal", "karras"):
                raise ValueError(f"There is no scheduler {name!r}.")

    def encode(self, prompts: list[str], kind: str = "positive") -> list[torch.Tensor]:
        """A prompt is its context: (m, d), with its text."""
        encoded = [_fixed(TOKENS, CONTEXT, seed=zlib.crc32(prompt.encode())) for prompt in prompts]
        for context, prompt in zip(encoded, prompts, strict=True):
            context.text = prompt
        return encoded

    def length(self, prompt: str) -> int:
        return TOKENS

    def release(self) -> None:
        pass

    def context(self, prompt: torch.Tensor) -> torch.Tensor:
        return prompt

    def session(self, **_) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sigmas(self, scheduler: str, steps: int) -> torch.Tensor:
        power = {"normal": 1.0, "karras": 7.0}[scheduler]
        rising = torch.linspace(0.1 ** (1 / power), 10.0 ** (1 / power), steps) ** power
        return torch.cat([rising.flip(0), torch.zeros(1)])

    def start(self, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return noise * per_row(sigma, noise)

    def prediction_unit(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma

    def _pull(self, sigma: torch.Tensor) -> torch.Tensor:
        """How much of the denoised prediction is the prompt's mean: (b,)."""
        return sigma**2 / (sigma**2 + SPREAD**2)

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        self.base_rows.append(len(x))
        mean = (torch.stack(list(prompts)).mean(1) @ self.to_mean)[:, :, None, None]
        return x + per_row(self._pull(sigma), x) * (mean - x)

    def student(self, adapter: Adapter, x, sigma, prompts, negative, omega) -> torch.Tensor:
        """The base, moved by what the adapter adds at two layers that see x."""
        self.student_rows.append(len(x))
        if len(x) > self.most_rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate everything.")
        context, h = torch.stack(list(prompts)), x.flatten(2).mT  # b n c
        difference = (context - torch.stack(list(negative))).mean(1, keepdim=True) @ self.to_mean  # b 1 c
        prepared = adapter.prepare(omega, sigma, context, dtype=x.dtype)
        added = 0
        for name, to_h in self.to_h.items():
            at_layer, zeros = h @ to_h, torch.zeros(*h.shape[:2], to_h.shape[1])
            if adapter.changes_attention_output:
                out = adapter.add_after_attention(name, zeros, at_layer, context, prepared)
            else:
                out = adapter.add_inside_attention(
                    name, zeros, (difference @ to_h).expand_as(zeros), at_layer, prepared
                )
            added = added + out @ self.from_h[name]
        return self.denoise(x, sigma, prompts) + per_row(self._pull(sigma), x) * added.mT.reshape(x.shape)

    def picture(self, latent: torch.Tensor) -> Image.Image:
        return Image.new("RGB", (latent.shape[-1] * 8, latent.shape[-2] * 8))

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.cuda.OutOfMemoryError)

    def free_unused(self) -> None:
        pass

    def used(self) -> int:
        return 0

    def available(self) -> int | None:
        return None

    def system_available(self) -> int:
        return 10**12

    def bytes_of(self, prompt: torch.Tensor) -> int:
        return prompt.nbytes


class Stopped(Exception):
    """What a caller raises to stop a run."""


def stop_after(step: int, phase: str = "train") -> Callbacks:
    def on_progress(progress: Progress) -> None:
        if progress.phase == phase and progress.step >= step:
            raise Stopped

    return Callbacks(on_progress)


def weights(trained: Trained) -> torch.Tensor:
    return torch.cat([value.flatten() for value in trained.adapter.state_dict().values()])


def reported(trained: Trained) -> dict:
    """All that a run reports but its time."""
    training = {key: value for key, value in trained.info.training.items() if key != "seconds"}
    return {
        "losses": trained.losses,
        "history": [asdict(measured) for measured in trained.history],
        "training": training,
    }


def assert_same(one: Trained, other: Trained) -> None:
    """Bit for bit."""
    assert reported(one) == reported(other)
    assert torch.equal(weights(one), weights(other))


def assert_close(one: Trained, other: Trained, tolerance: float = 1e-4) -> None:
    assert one.losses == pytest.approx(other.losses, rel=tolerance)
    torch.testing.assert_close(weights(one), weights(other), rtol=tolerance, atol=tolerance)

"""The training recipe of the paper's authors, as their public code has it (arXiv 2503.07274).

Trajectories are stored first, in half precision: for each caption one of the training schedule's 1000 DDPM steps, with
one omega for all of it, drawn uniformly, and CFG's prediction at each state. Then AdamW without weight decay learns
from the states in random order, by the plain MSE of what the model itself predicts (eps, or a flow model's velocity).
The learning rate rises linearly from a ten-thousandth of itself for a tenth of the steps, and follows a cosine back to
that. Gradients are not clipped, and weights not averaged.

Shapes: t noise levels, n captions, b rows of a batch.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import trange

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.guidance import cfg, per_row
from comfyui_agd.agd_core.seeds import seeded_generator
from comfyui_agd.training.memory import BothPredictions
from comfyui_agd.training.model import Denoiser, Model, Prompt
from comfyui_agd.training.solvers import Ancestral, solver_step

STEPS = 1000
_WARMUP, _LOWEST = 0.1, 1e-4
_ROWS = 64  # evaluated at once
_STORED_SEED, _ORDER_SEED = 11, 12


class States(NamedTuple):
    """x and CFG's prediction `out` (b, c, h, w), sigma, omega and the caption's number, `row`: (b,) each."""

    x: torch.Tensor
    out: torch.Tensor
    sigma: torch.Tensor
    omega: torch.Tensor
    row: torch.Tensor


@dataclass(frozen=True)
class StoredTrajectories:
    """x and `out` (t, n, c, h, w) in fp16, sigma (t,), omega (n,)."""

    x: torch.Tensor
    out: torch.Tensor
    sigma: torch.Tensor
    omega: torch.Tensor

    @property
    def evaluations(self) -> int:
        """Of the base, in rows."""
        return 2 * self.x.shape[0] * self.x.shape[1]

    @functools.cached_property
    def _order(self) -> torch.Tensor:
        return torch.randperm(self.x.shape[0] * self.x.shape[1], generator=seeded_generator(_ORDER_SEED))

    def batch(self, step: int, rows: int) -> States:
        """That of an optimiser step, counted from 0; none comes again."""
        drawn = self._order[step * rows : (step + 1) * rows]
        at, row = drawn // self.x.shape[1], drawn % self.x.shape[1]
        return States(self.x[at, row].float(), self.out[at, row].float(), self.sigma[at], self.omega[row], row)


def store(
    model: Model, captions: list[str], size: tuple[int, int], omega_max: float, steps: int = STEPS
) -> dict[str, torch.Tensor]:
    """The fields of `StoredTrajectories`. `size`: width and height in pixels."""
    denoiser, encode, n = model.denoiser, model.text_encoder.encode, len(captions)
    positive, negative = encode(captions), encode([""], "negative") * n
    generator, shape = seeded_generator(_STORED_SEED), denoiser.latent_shape(*size)
    omega = 1 + (omega_max - 1) * torch.rand(n, generator=generator)
    sigmas, both = denoiser.sigmas("normal", steps), BothPredictions(denoiser, model.memory, _ROWS)
    kept, out = torch.zeros(2, steps, n, *shape, dtype=torch.float16).unbind()
    with denoiser.session():
        x = denoiser.start(torch.randn(n, *shape, generator=generator), sigmas[:1].expand(n)).cpu()
        for i in trange(steps, desc="storing trajectories", leave=False):
            sigma, sigma_next = sigmas[i].expand(n), sigmas[i + 1].expand(n)
            target = cfg(*both(x, sigma, positive, negative), omega)
            kept[i], out[i] = x, own_prediction(denoiser, x, sigma, target)
            # An ancestral step of this length is DDPM's.
            noise = torch.randn(n, *shape, generator=generator)
            x = solver_step(
                x, target, sigma, sigma_next, Ancestral(torch.ones(n, dtype=torch.bool), noise, denoiser.is_flow)
            )
    return {"x": kept, "out": out, "sigma": sigmas[:-1].clone(), "omega": omega}


def own_prediction(denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
    """What the model itself predicts, of a denoised prediction (b, c, h, w)."""
    return (x - denoised) / per_row(denoiser.prediction_unit(sigma), x)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """`step` counts from 0."""
    rising = max(1, round(_WARMUP * steps))
    after = (step - rising) / max(1, steps - rising)
    share = step / rising if step < rising else 0.5 * (1 + math.cos(math.pi * after))
    return peak * (_LOWEST + (1 - _LOWEST) * share)


@dataclass(frozen=True)
class Distillation:
    """`rate`: the peak of the learning rate; `batch`: states per optimiser step."""

    rate: float
    steps: int
    batch: int

    def __call__(
        self,
        denoiser: Denoiser,
        adapter: Adapter,
        stored: StoredTrajectories,
        positive: list[Prompt],
        negative: Prompt,
        after: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Train the adapter. `after`: called with how many steps are done. Call it inside the denoiser's session."""
        optimiser = torch.optim.AdamW(adapter.parameters(), lr=self.rate, weight_decay=0.0)
        for step in range(self.steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, self.steps, self.rate)
            x, out, sigma, omega, row = stored.batch(step, self.batch)
            prompts = [positive[i] for i in row.tolist()]
            student = denoiser.student(adapter, x, sigma, prompts, [negative] * len(prompts), omega)
            optimiser.zero_grad()
            F.mse_loss(own_prediction(denoiser, x, sigma, student.cpu()), out).backward()
            optimiser.step()
            after(step + 1)

"""Everything that decides what a training run does, besides its base and prompts."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields

import torch

from ..agd_core.config import OMEGA_EMBEDDINGS, AdapterConfig, BaseInfo, KindConfig
from ..agd_core.guidance import RULES, GuidanceRule
from ..agd_core.kinds import KINDS
from .solvers import SOLVERS

LOSSES = ("balanced", "plain")
OMEGA_SAMPLINGS = ("log_uniform", "uniform")
PRECISIONS = ("base", "bf16")
CHECKPOINTING = ("auto", "on", "off")
_RATIO = re.compile(r"[1-9]\d*:[1-9]\d*")


def option(default, help: str, choices: Collection[str] | None = None, *, result: bool = True):
    """A field with what the command line shows for it. `result`: whether another value gives another adapter."""
    return field(default=default, metadata={"help": help, "choices": choices, "result": result})


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are ours; where the paper (arXiv 2503.07274) differs, the help text says so."""

    iterations: int = option(1000, "optimiser steps")
    batch: int = option(4, "states per optimiser step, on all GPUs together")
    learning_rate: float = option(1e-4, "peak of AdamW's learning rate")
    warmup: float = option(0.1, "share of the iterations with a rising learning rate; a cosine to 0 follows")
    clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.99, "decay of the moving average that is saved as the adapter")
    loss: str = option("balanced", "'balanced' weighs every row alike; 'plain' is the paper's MSE", LOSSES)
    omega_min: float = option(1.0, "smallest guidance scale trained")
    omega_max: float = option(12.0, "largest guidance scale trained")
    omega_sampling: str = option("log_uniform", "how omega is drawn; the paper: 'uniform'", OMEGA_SAMPLINGS)
    teacher: str = option("cfg", "the guidance that is learnt: docs/training.md, Better teachers", RULES)
    interval_sigma_min: float = option(0.28, "interval: no guidance at this noise level and below")
    interval_sigma_max: float = option(5.42, "interval: no guidance above this noise level")
    rescale_phi: float = option(0.7, "rescale: share of the rescaled prediction in the target")
    apg_eta: float = option(0.0, "apg: share of the guidance along the unguided prediction that is kept")
    apg_threshold: float = option(15.0, "apg: largest norm of the guidance, of SDXL-sized latents; 0: any")
    width: int = option(512, "of the pictures, in pixels")
    height: int = option(512, "of the pictures, in pixels")
    frames: int = option(1, "of a video, as many as its latent has; 1: a picture")
    aspect_ratios: tuple[str, ...] = option(
        (), "train at these ratios, such as 1:1 3:2 2:3, of pictures with the area of width x height"
    )
    pool: int = option(8, "live trajectories, in batches")
    reuse: int = option(1, "optimiser steps per teacher evaluation: states come again, each time with another omega")
    reuse_from: int = option(256, "batches of states, the last so many, that come again with `reuse`")
    steps_min: int = option(15, "fewest steps of a trajectory")
    steps_max: int = option(30, "most steps of a trajectory")
    schedulers: tuple[str, ...] = option(("normal", "karras"), "ComfyUI's schedulers that trajectories follow")
    solvers: tuple[str, ...] = option(SOLVERS, f"samplers that trajectories follow, of {', '.join(SOLVERS)}")
    on_policy: float = option(0.0, "share of trajectories that follow the student instead of the teacher")
    on_policy_from: float = option(0.25, "share of the iterations before any trajectory follows the student")
    precision: str = option("base", "compute in the base's own dtype, or in bf16 where the device has it", PRECISIONS)
    sigma_from: float = option(0.0, "learn at this noise level and above only, as one of a model's two experts")
    sigma_to: float = option(0.0, "learn below this noise level only; 0: at any")
    seed: int = option(0, "seed of everything random")
    held_out: int = option(8, "prompts kept out of training to measure gap closed on; 0 measures nothing")
    evaluate_every: int = option(250, "iterations between two measurements; the best adapter is kept; 0: at the end")
    patience: int = option(0, "measurements without a better one before training stops early; 0 never does")
    save_every: int = option(250, "iterations between two saved states; 0 saves one on interrupt only", result=False)
    keep_states: int = option(2, "saved states that are kept", result=False)
    preview_every: int = option(250, "iterations between two previews of the teacher and AGD; 0: none", result=False)
    checkpointing: str = option("auto", "compute activations twice to save memory", CHECKPOINTING, result=False)
    micro_batch: int = option(0, "states evaluated at once, on one GPU; 0 takes what fits", result=False)
    memory: float = option(0.0, "GB of the GPU's memory that may be used; 0 takes what is free", result=False)
    kind: str = option(
        "delta",
        "the adapter; paper_attention and paper_additive are the paper authors' own, cross_attention and offset ours "
        "after them",
        KINDS,
    )
    hidden: int = option(128, "width H inside the adapter of a layer; of low_rank the rank: try 16")
    modulated: bool = option(False, "low_rank, delta's rank: scaled by t and omega, and so no LoRA any more")
    rank: int = option(4, "delta: rank of changes of the blocks' linear layers beside it; 0: none")
    vector: int = option(0, "delta, low_rank: width inside a change of the timestep's vector; 0: none")
    use_timestep: bool = option(True, "paper_attention, paper_additive: know the timestep; the authors' default: no")
    use_prompt: bool = option(True, "paper_attention, paper_additive: know the prompt; the authors' default: no")
    encoder_width: int = option(128, "width inside the encoder of omega and t")
    gain: bool = option(True, "multiply the residual by (omega - 1); the paper: no")
    omega_embedding: str = option("log", "how omega is embedded; the paper: 'fourier'", OMEGA_EMBEDDINGS)
    shared_encoder: bool = option(True, "one omega/t encoder for all layers; the paper: one per layer")

    def __post_init__(self):
        wrong = [*self._wrong_choices(), *self._wrong_numbers()]
        if not 0 < self.omega_min <= self.omega_max or self.omega_max <= 1:
            wrong.append(f"omega goes from {self.omega_min} to {self.omega_max}, but must rise from above 0 to above 1")
        if self.sigma_to and not self.sigma_from < self.sigma_to:
            wrong.append(f"states go from sigma {self.sigma_from} to {self.sigma_to}, but must rise")
        if self.steps_max < self.steps_min:
            wrong.append(f"steps_max is {self.steps_max}, less than steps_min, {self.steps_min}")
        if not self.interval_sigma_max > self.interval_sigma_min:
            interval = f"{self.interval_sigma_min} to {self.interval_sigma_max}"
            wrong.append(f"the interval of guidance goes from sigma {interval}, but must rise")
        wrong += [f"aspect ratio {r!r} is not like 3:2" for r in self.aspect_ratios if not _RATIO.fullmatch(r)]
        if wrong:
            raise ValueError(f"These training settings can't work: {'; '.join(wrong)}.")

    def _wrong_choices(self) -> list[str]:
        wrong = []
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in choices:
                wrong.append(f"{f.name} is {value!r}, but must be one of {', '.join(choices)}")
        for solver in self.solvers:
            if solver not in SOLVERS:
                wrong.append(f"there is no sampler {solver!r} for trajectories, choose from {', '.join(SOLVERS)}")
        return wrong + [f"{name} is empty" for name in ("schedulers", "solvers") if not getattr(self, name)]

    def _wrong_numbers(self) -> list[str]:
        positive = [
            *("iterations", "batch", "learning_rate", "clip", "width", "height", "pool", "reuse", "steps_min"),
            *("reuse_from", "keep_states", "frames"),
        ]
        counts = [
            *("held_out", "evaluate_every", "patience", "save_every", "preview_every", "micro_batch", "memory"),
            *("interval_sigma_min", "apg_threshold", "sigma_from", "sigma_to"),
        ]
        shares = ["warmup", "on_policy", "on_policy_from", "ema", "rescale_phi", "apg_eta"]
        values = {name: getattr(self, name) for name in positive + counts + shares}
        wrong = [f"{name} is {values[name]}, but must be above 0" for name in positive if not values[name] > 0]
        wrong += [f"{name} is {values[name]}, but must not be negative" for name in counts if not values[name] >= 0]
        wrong += [f"{name} is {values[name]}, but is a share, 0 to 1" for name in shares if not 0 <= values[name] <= 1]
        return wrong

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype to compute evaluations in; None is the base's own."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def rule(self) -> GuidanceRule:
        """What the teacher makes of both predictions."""
        return GuidanceRule(
            self.teacher,
            sigma_min=self.interval_sigma_min,
            sigma_max=self.interval_sigma_max,
            phi=self.rescale_phi,
            eta=self.apg_eta,
            threshold=self.apg_threshold or math.inf,
        )

    @property
    def learns_everywhere(self) -> bool:
        """Whether states of all noise levels are learnt from."""
        return self.sigma_from == self.sigma_to == 0

    def learns_at(self, sigma: torch.Tensor) -> torch.Tensor:
        """Whether states at these noise levels are learnt from."""
        return (sigma >= self.sigma_from) & (sigma < (self.sigma_to or math.inf))

    def buckets(self) -> list[tuple[int, int]]:
        """(width, height) of the pictures of training: width x height, or one of that area per aspect ratio."""
        if not self.aspect_ratios:
            return [(self.width, self.height)]
        unit, area = 64 if min(self.width, self.height) >= 256 else 16, self.width * self.height
        found = []
        for ratio in self.aspect_ratios:
            across, down = map(int, ratio.split(":"))
            width = math.sqrt(area * across / down)
            wide, high = (max(unit, round(side / unit) * unit) for side in (width, area / width))
            found.append((wide, high))
        return list(dict.fromkeys(found))

    def result_settings(self) -> dict:
        """The settings that decide which adapter comes out, as JSON data; the others may change between sessions."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["result"]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}

    def adapter_config(self, base: BaseInfo, prompt_tokens: int) -> AdapterConfig:
        """`prompt_tokens`: the length of a short prompt's context."""
        kind = self.kind_config()
        return AdapterConfig(kind.layers_of(base), kind, prompt_tokens, base.vector, base.time_channels)

    def kind_config(self) -> KindConfig:
        """The kind's own settings: those of its fields, by their names. `hidden` is the rank of low_rank.

        Raises `ValueError` where they can't work.
        """
        kind = KINDS[self.kind].Config
        chosen = {f.name: getattr(self, f.name) for f in fields(kind)}
        if self.kind == "low_rank":
            chosen["rank"] = self.hidden
        if not self.shared_encoder and self.kind in ("delta", "low_rank"):
            raise ValueError(f"Kind {self.kind!r} has one encoder for all layers, so shared_encoder must be on.")
        return kind(**chosen)

"""Everything that decides what a training run does, besides its base and prompts."""

from dataclasses import dataclass, field, fields

import torch

from ..agd_core.config import KINDS, OMEGA_EMBEDDINGS, AdapterConfig, BaseInfo

LOSSES = ("balanced", "plain")
OMEGA_SAMPLINGS = ("log_uniform", "uniform")
PRECISIONS = ("base", "bf16")


def option(default, help: str, choices: tuple[str, ...] | None = None):
    """A field with what the command line shows for it."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are ours; where the paper (arXiv 2503.07274) differs, the help text says so."""

    iterations: int = option(1000, "optimiser steps")
    batch: int = option(4, "states per optimiser step")
    learning_rate: float = option(1e-4, "peak of AdamW's learning rate")
    warmup: float = option(0.1, "share of the iterations with a rising learning rate; a cosine to 0 follows")
    clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.99, "decay of the moving average that is saved as the adapter")
    loss: str = option("balanced", "'balanced' weighs every row alike; 'plain' is the paper's MSE", LOSSES)
    omega_min: float = option(1.0, "smallest guidance scale trained")
    omega_max: float = option(12.0, "largest guidance scale trained")
    omega_sampling: str = option("log_uniform", "how omega is drawn; the paper: 'uniform'", OMEGA_SAMPLINGS)
    width: int = option(512, "of the pictures, in pixels")
    height: int = option(512, "of the pictures, in pixels")
    pool: int = option(8, "live trajectories, in batches")
    steps_min: int = option(15, "fewest steps of a trajectory")
    steps_max: int = option(30, "most steps of a trajectory")
    schedulers: tuple[str, ...] = option(("normal", "karras"), "ComfyUI's schedulers that trajectories follow")
    ancestral: float = option(0.5, "share of trajectories that add noise at each step, as ancestral samplers do")
    on_policy: float = option(0.0, "share of trajectories that follow the student instead of the teacher")
    precision: str = option("base", "compute in the base's own dtype, or in bf16 where the device has it", PRECISIONS)
    seed: int = option(0, "seed of everything random")
    held_out: int = option(8, "prompts kept out of training to measure gap closed at the end; 0 measures nothing")
    save_every: int = option(250, "iterations between two saved states; 0 saves one on interrupt only")
    kind: str = option("cross_attention", "the adapter", KINDS)
    hidden: int = option(128, "width H inside the adapter of a site")
    encoder_width: int = option(128, "width inside the encoder of omega and t")
    gain: bool = option(True, "multiply the residual by (omega - 1); the paper: no")
    omega_embedding: str = option("log", "how omega is embedded; the paper: 'fourier'", OMEGA_EMBEDDINGS)
    shared_encoder: bool = option(True, "one omega/t encoder for all sites; the paper: one per site")

    def __post_init__(self):
        wrong = []
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in choices:
                wrong.append(f"{f.name} is {value!r}, but must be one of {', '.join(choices)}")
        positive = ("iterations", "batch", "learning_rate", "clip", "width", "height", "pool", "steps_min")
        wrong += [
            f"{name} is {getattr(self, name)}, but must be above 0" for name in positive if getattr(self, name) <= 0
        ]
        if not 0 < self.omega_min <= self.omega_max or self.omega_max <= 1:
            wrong.append(f"omega goes from {self.omega_min} to {self.omega_max}, but must rise from above 0 to above 1")
        if self.steps_max < self.steps_min:
            wrong.append(f"steps_max is {self.steps_max}, less than steps_min, {self.steps_min}")
        shares = ("warmup", "ancestral", "on_policy", "ema")
        wrong += [
            f"{name} is {getattr(self, name)}, but is a share, 0 to 1"
            for name in shares
            if not 0 <= getattr(self, name) <= 1
        ]
        if not self.schedulers:
            wrong.append("schedulers is empty")
        if wrong:
            raise ValueError(f"These training settings can't work: {'; '.join(wrong)}.")

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype to compute evaluations in; None is the base's own."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def adapter_config(self, base: BaseInfo, prompt_tokens: int) -> AdapterConfig:
        """`prompt_tokens`: the length of a short prompt's context."""
        return AdapterConfig(
            sites=base.sites,
            kind=self.kind,
            hidden=self.hidden,
            gain=self.gain,
            omega_embedding=self.omega_embedding,
            shared_encoder=self.shared_encoder,
            encoder_width=self.encoder_width,
            prompt_tokens=prompt_tokens,
        )

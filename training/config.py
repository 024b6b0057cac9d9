"""Everything that decides what a training run does, besides its base and prompts."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import filterfalse

import torch

from ..agd_core.config import MOST_CHANNELS, OMEGA_EMBEDDINGS, AdapterConfig, BaseInfo, KindConfig
from ..agd_core.guidance import RULES, GuidanceRule
from ..agd_core.kinds import KINDS
from ..agd_core.seeds import LARGEST_SEED
from .options import Settings, option
from .solvers import SOLVERS

LOSSES = ("balanced", "plain")
OMEGA_SAMPLINGS = ("log_uniform", "uniform")
PRECISIONS = ("base", "bf16")
CHECKPOINTING = ("auto", "on", "off")
# Ratios up to this one, and numbers that can't overflow.
_RATIO, _WIDEST = re.compile(r"[1-9]\d{0,3}:[1-9]\d{0,3}"), 8
_STEPS, _COUNT = 1_000_000, 10_000
_SHARE = (0.0, 1.0)
_SIDE = (8, 16_384)
_SIGMA = (0.0, 1e6)
_OMEGA = (0.01, 1000.0)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Defaults are ours; where the paper (arXiv 2503.07274) differs, the help text says so. Some families and kinds
    have others, which `presets.settings_for` knows.
    """

    refusal = "These training settings can't work"

    iterations: int = option(1500, "optimiser steps", limits=(1, _STEPS))
    batch: int = option(4, "noisy latents per optimiser step, on all GPUs together", limits=(1, 4096))
    learning_rate: float = option(5e-4, "peak of AdamW's learning rate", limits=(1e-30, 1.0))
    warmup: float = option(
        0.1, "share of the iterations with a rising learning rate; a cosine to 0 follows", limits=_SHARE
    )
    clip: float = option(1.0, "largest norm of the gradient", limits=(1e-6, 1e6))
    ema: float = option(0.99, "decay of the moving average that is saved as the adapter", limits=_SHARE)
    loss: str = option("balanced", "'balanced' weighs every row alike; 'plain' is the paper's MSE", LOSSES)
    omega_min: float = option(1.0, "smallest guidance scale (cfg) that it learns", limits=_OMEGA)
    omega_max: float = option(
        12.0, "largest guidance scale (cfg) that it learns: the most that you will sample with", limits=_OMEGA
    )
    omega_sampling: str = option("log_uniform", "how guidance scales are drawn; the paper: 'uniform'", OMEGA_SAMPLINGS)
    teacher: str = option("cfg", "the guidance that is learnt: docs/training.md, Better teachers", RULES)
    interval_sigma_min: float = option(0.28, "interval: no guidance at this noise level and below", limits=_SIGMA)
    interval_sigma_max: float = option(5.42, "interval: no guidance above this noise level", limits=_SIGMA)
    rescale_phi: float = option(0.7, "rescale: share of the rescaled prediction in the target", limits=_SHARE)
    apg_eta: float = option(0.0, "apg: share of the guidance along the unguided prediction that is kept", limits=_SHARE)
    apg_threshold: float = option(
        15.0, "apg: largest norm of the guidance, of SDXL-sized latents; 0: any", limits=(0.0, 1e6)
    )
    width: int = option(512, "width of the pictures it learns from, in pixels", limits=_SIDE)
    height: int = option(512, "height of the pictures it learns from, in pixels", limits=_SIDE)
    frames: int = option(1, "of a video, as many as its latent has; 1: a picture", limits=(1, 1024))
    aspect_ratios: tuple[str, ...] = option(
        (), "train at these ratios, such as 1:1 3:2 2:3, of pictures with the area of width x height"
    )
    pool: int = option(8, "sampling runs that are kept going at a time, in batches", limits=(1, _COUNT))
    reuse: int = option(
        4, "optimiser steps per batch of the teacher's: it comes again, with other guidance scales", limits=(1, 1000)
    )
    reuse_from: int = option(256, "batches, the last so many, that come again with `reuse`", limits=(1, _STEPS))
    steps_min: int = option(15, "fewest steps of a sampling run that is learnt from", limits=(1, 1000))
    steps_max: int = option(30, "most steps of such a run", limits=(1, 1000))
    schedulers: tuple[str, ...] = option(("normal", "karras"), "ComfyUI's schedulers, of such runs")
    solvers: tuple[str, ...] = option(SOLVERS, f"samplers of such runs, of {', '.join(SOLVERS)}", SOLVERS)
    on_policy: float = option(0.0, "share of such runs that the adapter steps instead of the teacher", limits=_SHARE)
    on_policy_from: float = option(0.25, "share of the iterations before the adapter steps any", limits=_SHARE)
    precision: str = option("base", "compute in the base's own dtype, or in bf16 where the device has it", PRECISIONS)
    sigma_from: float = option(
        0.0, "learn at this noise level and above only, as one of a model's two experts", limits=_SIGMA
    )
    sigma_to: float = option(0.0, "learn below this noise level only; 0: at any", limits=_SIGMA)
    seed: int = option(0, "seed of everything random", limits=(0, LARGEST_SEED))
    held_out: int = option(
        8, "prompts kept out of training to measure gap closed on; 0 measures nothing", limits=(0, _COUNT)
    )
    evaluate_every: int = option(
        250, "iterations between two measurements; the best adapter is kept; 0: at the end", limits=(0, _STEPS)
    )
    patience: int = option(
        0, "measurements without a better one before training stops early; 0 never does", limits=(0, _STEPS)
    )
    save_every: int = option(
        250, "iterations between two saves of the run; 0 saves on interrupt only", limits=(0, _STEPS), result=False
    )
    keep_states: int = option(2, "how many saves of the run are kept", limits=(1, _COUNT), result=False)
    preview_every: int = option(
        250, "iterations between two previews of the teacher and AGD; 0: none", limits=(0, _STEPS), result=False
    )
    checkpointing: str = option("auto", "compute activations twice to save memory", CHECKPOINTING, result=False)
    micro_batch: int = option(
        0, "noisy latents evaluated at once, on one GPU; 0 takes what fits", limits=(0, 4096), result=False
    )
    memory: float = option(
        0.0, "GB of the GPU's memory that may be used; 0 takes what is free", limits=(0.0, 1e5), result=False
    )
    kind: str = option(
        "delta",
        "the adapter; paper_attention and paper_additive are the paper authors' own, cross_attention and offset ours "
        "after them",
        KINDS,
    )
    hidden: int = option(128, "adapter size: its width in each layer", limits=(1, MOST_CHANNELS))
    modulated: bool = option(
        False, "the rank's changes depend on the noise level and the guidance scale, and are no LoRA any more"
    )
    rank: int = option(
        16, "LoRA rank of the adapter's changes of linear layers; 0: none of them", limits=(0, MOST_CHANNELS)
    )
    vector: int = option(
        0, "adapter size for changes of a transformer's timestep vector; 0: none", limits=(0, MOST_CHANNELS)
    )
    attention_every: int = option(
        1,
        "of a stack of blocks: works in the attention of the first, and of every n-th from there on",
        limits=(1, 1000),
    )
    use_timestep: bool = option(True, "the adapter knows the timestep; the authors' default: no")
    use_prompt: bool = option(True, "the adapter knows the prompt; the authors' default: no")
    encoder_width: int = option(128, "width inside the encoder of guidance scale and timestep", limits=(2, 4096))
    gain: bool = option(True, "multiply what the adapter adds by (guidance scale - 1); the paper: no")
    omega_embedding: str = option("log", "how the guidance scale is embedded; the paper: 'fourier'", OMEGA_EMBEDDINGS)
    shared_encoder: bool = option(
        True, "one encoder of guidance scale and timestep for all layers; the paper: one per layer"
    )

    def contradictions(self) -> Iterator[str]:
        if not self.omega_min <= self.omega_max or self.omega_max <= 1:
            yield (
                f"the guidance scale goes from {self.omega_min} (omega_min) to {self.omega_max} (omega_max), but must "
                "rise from above 0 to above 1"
            )
        if self.sigma_to and not self.sigma_from < self.sigma_to:
            levels = f"{self.sigma_from} (sigma_from) to {self.sigma_to} (sigma_to)"
            yield f"noise levels go from {levels}, but must rise"
        if self.steps_max < self.steps_min:
            yield f"steps_max is {self.steps_max}, less than steps_min, {self.steps_min}"
        if not self.interval_sigma_max > self.interval_sigma_min:
            interval = f"{self.interval_sigma_min} to {self.interval_sigma_max}"
            yield f"the interval of guidance goes from noise level {interval}, but must rise"
        for ratio in filterfalse(_is_ratio, self.aspect_ratios):
            yield f"aspect ratio {ratio!r:.60} is not like 3:2, and from 1:{_WIDEST} to {_WIDEST}:1"

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

    def own_settings(self) -> dict:
        """All settings but those that its kind of adapter doesn't have."""
        foreign = foreign_settings(self.kind, asdict(self))
        return {name: value for name, value in asdict(self).items() if name not in foreign}

    def result_settings(self) -> dict:
        """The settings that decide which adapter comes out, as JSON data; the others may change between sessions."""
        own, decides = self.own_settings(), {f.name for f in fields(self) if f.metadata["result"]}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in own.items() if key in decides}

    def adapter_config(self, base: BaseInfo, prompt_tokens: int) -> AdapterConfig:
        """`prompt_tokens`: the length of a short prompt's context."""
        kind = self.kind_config()
        return AdapterConfig(kind.layers_of(base), kind, prompt_tokens, base.vector, base.time_channels)

    def kind_config(self) -> KindConfig:
        """The kind's own settings: those of its fields, by their names. Raises `ValueError` where they can't work."""
        kind = KINDS[self.kind].Config
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)})

    @property
    def size_setting(self) -> str | None:
        """The setting that the adapter's size goes by; None: its kind comes in one size."""
        own = settings_of_kind(self.kind)
        return next((name for name in ("hidden", "rank") if name in own), None)


def _is_ratio(text: str) -> bool:
    if not _RATIO.fullmatch(text):
        return False
    across, down = map(int, text.split(":"))
    return max(across, down) <= _WIDEST * min(across, down)


def settings_of_kind(kind: str) -> list[str]:
    """The names of the settings that a kind of adapter has."""
    return [f.name for f in fields(KINDS[kind].Config)]


def foreign_settings(kind: str, names: Iterable[str]) -> list[str]:
    """Of `names` those that are settings of other kinds of adapters only."""
    of_kinds = {name for each in KINDS for name in settings_of_kind(each)}
    return [name for name in names if name in of_kinds and name not in settings_of_kind(kind)]

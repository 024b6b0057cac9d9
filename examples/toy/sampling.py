"""Sampling the toy through ComfyUI's own nodes."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.utils
import nodes
import torch
from tqdm import tqdm

from . import model as toy
from .bases import BASES, Base
from .scenes import IMAGE_SIZE, Scene, caption, draw_scenes

BATCH = 64
STEPS = 20
SAMPLER, SCHEDULER = "euler", "normal"


@dataclass(frozen=True)
class SamplerSettings:
    """KSampler's own, and EmptyLatentImage's `size`: width and height in pixels."""

    cfg: float
    seed: int
    steps: int = STEPS
    sampler: str = SAMPLER
    scheduler: str = SCHEDULER
    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)


@dataclass(frozen=True)
class Toy:
    """A toy's MODEL, CLIP and VAE."""

    base: Base
    model: object
    clip: object
    vae: object

    @classmethod
    def load(cls, name: str = "toy") -> "Toy":
        """`name`: one of `BASES`."""
        base = BASES[name]
        return cls(base, base.load(), toy.load_clip(), toy.load_vae())

    def settings(self, cfg: float, seed: int, steps: int = STEPS) -> SamplerSettings:
        """That suit its base."""
        return SamplerSettings(cfg, seed, steps, scheduler=self.base.scheduler)


@dataclass(frozen=True)
class Pictures:
    """(n, 3, size, size) in [0, 1], the latents (n, c, h, w) that they are decoded from, and the seconds that each
    batch of them spent inside KSampler."""

    images: torch.Tensor
    latents: torch.Tensor
    seconds: list[float]


@torch.inference_mode()
def encode(clip, prompts: list[str]) -> list[list]:
    """CONDITIONING for batches of `BATCH` prompts, one prompt per row, from one CLIPTextEncode each."""
    node = nodes.CLIPTextEncode()
    entries = [node.encode(clip, prompt)[0][0] for prompt in prompts]
    batches = [entries[first : first + BATCH] for first in range(0, len(entries), BATCH)]
    return [
        [[torch.cat([cond for cond, _ in batch]), {"pooled_output": torch.cat([x["pooled_output"] for _, x in batch])}]]
        for batch in batches
    ]


@torch.inference_mode()
def sample_latents(
    model, positive: list, negative: list, settings: SamplerSettings, noise: Sequence[int] | None = None
) -> dict:
    """A LATENT with a row per prompt of `positive`, through EmptyLatentImage and KSampler.

    `noise`: which of the seed's noises the rows get, by default the first ones.
    """
    latent = nodes.EmptyLatentImage().generate(*settings.size, len(positive[0][0]))[0]
    latent |= {"batch_index": list(noise)} if noise else {}
    how = (settings.seed, settings.steps, settings.cfg, settings.sampler, settings.scheduler)
    return nodes.KSampler().sample(model, *how, positive, negative, latent, denoise=1.0)[0]


@torch.inference_mode()
def sample(
    parts: Toy,
    model,
    prompts: list[list],
    settings: SamplerSettings,
    *,
    negative: list[list] | None = None,
    noise: Sequence[Sequence[int]] | None = None,
) -> Pictures:
    """One picture per encoded prompt, each batch with the next seed.

    `negative` and `noise`: for each batch, as `sample_latents` takes them; without `negative` prompts are empty.
    """
    comfy.utils.PROGRESS_BAR_ENABLED = False  # ours counts batches, not the steps of one
    empty, images, latents, seconds = encode(parts.clip, [""])[0], [], [], []
    for i, positive in enumerate(tqdm(prompts, desc=f"sampling at cfg {settings.cfg:g}", leave=False)):
        own, unwanted = dataclasses.replace(settings, seed=settings.seed + i), negative[i] if negative else empty
        start = time.perf_counter()
        latent = sample_latents(model, positive, unwanted, own, noise[i] if noise else None)
        seconds.append(time.perf_counter() - start)
        latents.append(latent["samples"])
        images.append(nodes.VAEDecode().decode(parts.vae, latent)[0].movedim(-1, 1).clamp(0, 1))
    return Pictures(torch.cat(images).clone(), torch.cat(latents).clone(), seconds)


def captions_of(scenes: list[Scene]) -> list[str]:
    """Their full captions; in every other pair the second thing is named first."""
    return [caption(scene, swapped=i % 2 == 1) for i, scene in enumerate(scenes)]


def held_out_captions(count: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Scenes that no training saw, with their full captions."""
    scenes = draw_scenes(count, seed, held=True)
    return scenes, captions_of(scenes)

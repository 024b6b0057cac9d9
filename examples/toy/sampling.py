"""Sampling the toy through ComfyUI's own nodes, and judging what comes out."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.utils
import nodes
import torch
from tqdm import tqdm

from . import model as toy
from .judge import Judge, frechet_distance, prompt_accuracy
from .scenes import IMAGE_SIZE, Scene, caption, draw_scenes, render

BATCH = 64
STEPS = 20
SAMPLER, SCHEDULER = "euler", "normal"
REFERENCE_IMAGES = 4096


@dataclass(frozen=True)
class Toy:
    """The toy's MODEL, CLIP and VAE."""

    model: object
    clip: object
    vae: object

    @classmethod
    def load(cls) -> "Toy":
        return cls(toy.load_unet(), toy.load_clip(), toy.load_vae())


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
def sample(
    parts: Toy,
    model,
    prompts: list[list],
    *,
    cfg: float,
    seed: int,
    steps: int = STEPS,
    negative: list[list] | None = None,
    noise: Sequence[Sequence[int]] | None = None,
    sampler: str = SAMPLER,
    scheduler: str = SCHEDULER,
) -> tuple[torch.Tensor, float]:
    """One picture per encoded prompt through EmptyLatentImage, KSampler and VAEDecode.

    `negative`: batches like those of `prompts`, empty prompts by default. `noise`: for each batch which of its seed's
    noises the rows get; by default the first ones. Returns the pictures (n, 3, 64, 64) and the seconds spent inside
    KSampler.
    """
    comfy.utils.PROGRESS_BAR_ENABLED = False  # ours counts batches, not the steps of one
    empty, images, seconds = encode(parts.clip, [""])[0], [], 0.0
    for i, positive in enumerate(tqdm(prompts, desc=f"sampling at cfg {cfg:g}", leave=False)):
        latent = nodes.EmptyLatentImage().generate(IMAGE_SIZE, IMAGE_SIZE, len(positive[0][0]))[0]
        latent |= {"batch_index": list(noise[i])} if noise else {}
        unwanted = negative[i] if negative else empty
        start = time.perf_counter()
        latent = nodes.KSampler().sample(
            model, seed + i, steps, cfg, sampler, scheduler, positive, unwanted, latent, denoise=1.0
        )[0]
        seconds += time.perf_counter() - start
        images.append(nodes.VAEDecode().decode(parts.vae, latent)[0].movedim(-1, 1).clamp(0, 1))
    return torch.cat(images).clone(), seconds


class Jury:
    """The judge with the features of real, held-out pictures."""

    def __init__(self):
        self.judge = Judge().eval().requires_grad_(False)
        self.judge.load_state_dict(comfy.utils.load_torch_file(str(toy.WEIGHTS / "judge.safetensors")))
        self.judge.float()

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """(REFERENCE_IMAGES, 128)."""
        return self.features(render(draw_scenes(REFERENCE_IMAGES, 17, held=True), 17))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, 64, 64) in [0, 1] -> (n, 128)."""
        return torch.cat([self.judge.features(part) for part in images.split(256)])

    def accuracy(self, images: torch.Tensor, scenes: list[Scene]) -> float:
        return prompt_accuracy(self.judge, images, scenes)

    def frechet(self, images: torch.Tensor) -> float:
        """To real pictures, in the judge's feature space."""
        return frechet_distance(self.features(images), self.reference)


def captions_of(scenes: list[Scene]) -> list[str]:
    """Their full captions; every other pair is told the other way round."""
    return [caption(scene, swapped=i % 2 == 1) for i, scene in enumerate(scenes)]


def held_out_captions(count: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Scenes that no training saw, with their full captions."""
    scenes = draw_scenes(count, seed, held=True)
    return scenes, captions_of(scenes)

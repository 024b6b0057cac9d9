"""Sampling the toy through ComfyUI's own nodes, and judging what comes out."""

from dataclasses import dataclass

import comfy.utils
import nodes
import torch
from tqdm import tqdm

from . import model as toy
from .judge import Judge, frechet_distance, prompt_accuracy
from .scenes import IMAGE_SIZE, Scene, caption, draw_scenes, render

BATCH = 32
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


def conditioning(clip, prompts: list[str]) -> list:
    """CONDITIONING with one prompt per row of the batch, from one CLIPTextEncode each."""
    encode = nodes.CLIPTextEncode()
    entries = [encode.encode(clip, prompt)[0][0] for prompt in prompts]
    pooled = torch.cat([entry[1]["pooled_output"] for entry in entries])
    return [[torch.cat([entry[0] for entry in entries]), {"pooled_output": pooled}]]


@torch.inference_mode()
def sample(parts: Toy, model, prompts: list[str], *, cfg: float, seed: int, steps: int = STEPS) -> torch.Tensor:
    """One picture per prompt through CLIPTextEncode, EmptyLatentImage, KSampler and VAEDecode: (n, 3, 64, 64)."""
    comfy.utils.PROGRESS_BAR_ENABLED = False  # ours counts pictures, not the steps of one batch
    negative, images = conditioning(parts.clip, [""]), []
    for first in tqdm(range(0, len(prompts), BATCH), desc=f"sampling at cfg {cfg:g}", leave=False):
        batch = prompts[first : first + BATCH]
        latent = nodes.EmptyLatentImage().generate(IMAGE_SIZE, IMAGE_SIZE, len(batch))[0]
        positive = conditioning(parts.clip, batch)
        latent = nodes.KSampler().sample(
            model, seed + first, steps, cfg, SAMPLER, SCHEDULER, positive, negative, latent, denoise=1.0
        )[0]
        images.append(nodes.VAEDecode().decode(parts.vae, latent)[0].movedim(-1, 1).clamp(0, 1))
    return torch.cat(images).clone()


class Jury:
    """The judge with the features of real, held-out pictures."""

    def __init__(self):
        self.judge = Judge().eval().requires_grad_(False)
        self.judge.load_state_dict(comfy.utils.load_torch_file(str(toy.WEIGHTS / "judge.safetensors")))
        self.judge.float()
        scenes = draw_scenes(REFERENCE_IMAGES, 17, held=True)
        self.reference = self.features(render(scenes, 17))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, 64, 64) in [0, 1] -> (n, 128)."""
        return torch.cat([self.judge.features(part) for part in images.split(256)])

    def accuracy(self, images: torch.Tensor, scenes: list[Scene]) -> float:
        return prompt_accuracy(self.judge, images, scenes)

    def frechet(self, images: torch.Tensor) -> float:
        """To real pictures, in the judge's feature space."""
        return frechet_distance(self.features(images), self.reference)


def held_out_captions(count: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Scenes that no training saw, with their full captions; every other pair is told the other way round."""
    scenes = draw_scenes(count, seed, held=True)
    return scenes, [caption(scene, swapped=i % 2 == 1) for i, scene in enumerate(scenes)]

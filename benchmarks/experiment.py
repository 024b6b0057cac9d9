"""The experiment on the toy that benchmarks share: its prompts; what is recorded, sampled and measured with them."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import comfy.model_patcher
import torch
from tqdm import tqdm, trange

from comfyui_agd.agd_core.comfyui.counting import counted
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.benchmarks import metrics
from comfyui_agd.benchmarks.work_folder import WorkFolder
from comfyui_agd.examples.toy.bases import Base
from comfyui_agd.examples.toy.gap import CFG, CaptionTrajectories, teacher_states
from comfyui_agd.examples.toy.judge import recognised
from comfyui_agd.examples.toy.measure import omega_star
from comfyui_agd.examples.toy.sampling import (
    BATCH,
    SAMPLER,
    STEPS,
    SamplerSettings,
    Toy,
    captions_of,
    encode,
    held_out_captions,
    sample,
)
from comfyui_agd.examples.toy.scenes import (
    IMAGE_SIZE,
    Description,
    Scene,
    all_unwanted,
    draw_scenes,
    open_caption,
    render,
    training_caption,
    training_negatives,
)
from comfyui_agd.examples.toy.scoring import Scorer
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.gap import Evaluation, TrajectoryState
from comfyui_agd.training.job import Job
from comfyui_agd.training.presets import trajectories_of
from comfyui_agd.training.progress import Progress
from comfyui_agd.training.recording import Recording, identity_of
from comfyui_agd.training.run_setup import split_prompts
from comfyui_agd.training.trainer import Callbacks

TRAINING_BATCH = 16
REUSE = 4  # optimiser steps per recorded batch, each with other guidance scales
BUDGETS = (20, 10, 6)  # evaluations per picture at which methods are compared
TRUE_STEPS = 50  # of the CFG whose pictures the others' are compared with
BLOCKS, KEPT_STEPS = 8, 10  # gap closed: blocks of captions, noise levels of a trajectory's 20
_TRAINING_SEED, _CHOICE_SEED, _GAP_SEED, _CAPTIONS_SEED, _OPEN_SEED = 3, 61, 29, 37, 43
_NOISE_SEED, _OPEN_NOISE_SEED = 70_000, 90_000
_ADDING_NOISE = ("ancestral", "sde", "ddpm", "lcm")  # in the names of ComfyUI's samplers that do
# Which attribute of a picture to forbid is read from the unguided picture, which is the same for every method.
_CHOOSING_OMEGA = 1.0


@dataclass(frozen=True)
class Sizes:
    """How much is computed. `pictures` per setting, at each of `omegas`; the first `compared` of them are compared with
    CFG's own of many steps; `pairs` of pictures, without and with a negative prompt; `iterations` of a training on so
    many `captions`, with so many batches of trajectories in the `pool`; `gap_captions` to measure the gap on, at
    `gap_omegas`. `tuned`: whether learning rates are tried where a method has several, or the last is taken.
    """

    pictures: int = 1024
    compared: int = 128
    pairs: int = 256
    iterations: int = 1200
    omegas: tuple[float, ...] = (2.0, 3.0, 5.0)
    gap_omegas: tuple[float, ...] = (2.0, 3.0, 5.0)
    captions: int = 2000
    pool: int = 8
    gap_captions: int = 64
    tuned: bool = True


QUICK_SIZES = Sizes(
    pictures=32,
    pairs=8,
    iterations=8,
    omegas=(3.0,),
    gap_omegas=(3.0,),
    captions=32,
    pool=1,
    gap_captions=2,
    tuned=False,
)


@dataclass
class PreparedMethod:
    """A method that can be sampled. `model` takes omega from the sampler's cfg.

    `identity`: what distinguishes it from its earlier versions; `parameters`: how many were trained; `evaluate`: how it
    does at the states of its teacher, for what is a function of a state; `rule`: that teacher's; `file`: an adapter's.
    """

    model: comfy.model_patcher.ModelPatcher
    identity: dict
    parameters: int = 0
    evaluate: Callable[[Sequence[TrajectoryState]], Evaluation] | None = None
    rule: GuidanceRule = CFG
    file: Path | None = None


class TrainingPrompts(NamedTuple):
    """What a training is given to distil from."""

    captions: list[str]
    negatives: list[str]


@dataclass(frozen=True)
class SampledAt:
    """How pictures are sampled. `sampler`, `scheduler` and `size`: others than the base's, or its own named."""

    omega: float
    steps: int = STEPS
    sampler: str | None = None
    scheduler: str | None = None
    size: int | None = None

    @property
    def named(self) -> dict[str, str | int]:
        """The sampler, the scheduler and the size, if they are given."""
        given = {"sampler": self.sampler, "scheduler": self.scheduler, "size": self.size}
        return {key: value for key, value in given.items() if value is not None}

    @property
    def adds_noise(self) -> bool:
        """Whether the sampler does: other noise with another number of steps."""
        return any(word in (self.sampler or SAMPLER) for word in _ADDING_NOISE)

    def settings(self, seed: int, base: Base) -> SamplerSettings:
        size = self.size or IMAGE_SIZE
        by_sampler = (self.sampler or SAMPLER, self.scheduler or base.scheduler, (size, size))
        return SamplerSettings(self.omega, seed, self.steps, *by_sampler)


@dataclass(frozen=True)
class Samples:
    """What is kept of n pictures: the judge's `features` (n, d), whether each is `correct` in all (n,), and the
    `latents` (n, c, h, w) that they were decoded from.

    `seconds` per picture, of each batch; `evaluations`: the rows that the model was given. Real pictures have none of
    the last three.
    """

    features: torch.Tensor
    correct: torch.Tensor
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    evaluations: torch.Tensor = field(default_factory=lambda: torch.tensor(0))

    def evaluations_per_step(self, steps: int) -> float:
        return self.evaluations.item() / (len(self.correct) * steps)


@dataclass(frozen=True)
class Pair:
    """A caption that leaves attributes open, which of its seed's noises to start from, and what is unwanted there."""

    caption: str
    noise: int
    unwanted: Description


def setting_name(method: str, omega: float, steps: int = STEPS) -> str:
    """Of what belongs to it."""
    return f"{method}-omega{omega:g}-steps{steps}"


def as_judged(images: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 3, h, w) in the size that the judge knows."""
    return torch.nn.functional.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="area")


def in_blocks(items: list) -> list[list]:
    """Spread over as many blocks as standard errors are taken over."""
    return [items[i::BLOCKS] for i in range(min(BLOCKS, len(items)))]


def shows(scene: Scene, unwanted: Description) -> bool:
    return any(unwanted.describes(thing) for thing in scene.things)


class ToyExperiment:
    """What all methods share: made when it is first needed, kept in the work folder where that saves time.

    `base`: a toy, or the name of one; each has a work folder of its own. `training_seed`: of all that is trained.
    """

    training_seed = 0

    def __init__(self, work: WorkFolder, sizes: Sizes, base: str | Toy = "toy"):
        self.work, self.sizes, self.scorer = work, sizes, Scorer()
        self.parts = Toy.load(base) if isinstance(base, str) else base
        self.base = self.parts.base
        self.base_parameters = sum(p.numel() for p in self.parts.model.model.diffusion_model.parameters())
        self._states: dict[tuple[GuidanceRule, bool], list[list[TrajectoryState]]] = {}

    @functools.cached_property
    def best_omega(self) -> float:
        return omega_star(self.base.name)

    def of_training(self, seed: int) -> "ToyExperiment":
        """The same with another seed of what is trained: other weights to start from, other states, other omegas."""
        other = copy.copy(self)
        other.training_seed = seed
        return other

    def model(self, width: int | None = None) -> ComfyModel:
        """`width`: adapters are for the layers of so many channels only."""
        model = ComfyModel(self.parts.model, self.parts.clip)
        layers = tuple(layer for layer in model.base.layers if width in (None, layer.width))
        model.base = dataclasses.replace(model.base, layers=layers)
        return model

    # Training: what all trained methods have in common.

    def train_config(self, **settings) -> TrainConfig:
        common = {
            "iterations": self.sizes.iterations,
            "batch": TRAINING_BATCH,
            "learning_rate": 2e-3,
            "omega_max": 6.0,
            "seed": self.training_seed,
            "width": IMAGE_SIZE,
            "height": IMAGE_SIZE,
            "encoder_width": 32,
            "pool": self.sizes.pool,
            "reuse": REUSE,
            "steps_min": 15,
            "steps_max": 25,
            "held_out": 0,
            "evaluate_every": 0,
            "preview_every": 0,
        }
        return TrainConfig(**common | trajectories_of(self.model().base) | settings)

    def training_captions(self, *, partial: bool = False) -> list[str]:
        """`partial`: a quarter of them leave something open, like those that the base was trained with."""
        scenes, rng = draw_scenes(self.sizes.captions, _TRAINING_SEED, held=False), random.Random(_TRAINING_SEED)
        return [training_caption(scene, rng) for scene in scenes] if partial else captions_of(scenes)

    @functools.cached_property
    def choice_captions(self) -> list[str]:
        """To choose between learning rates with."""
        return held_out_captions(16, _CHOICE_SEED)[1]

    def prompts(self, *, negatives: bool, partial: bool = False) -> TrainingPrompts:
        """Of a training. `negatives`: the toy's own too, or only empty ones; `partial`: as for `training_captions`."""
        return TrainingPrompts(self.training_captions(partial=partial), training_negatives() if negatives else [""])

    def recording(self, config: TrainConfig, prompts: TrainingPrompts) -> tuple[Recording, list[str]]:
        """The teacher's trajectories for this config, and the captions in the order in which it counts them: the same
        captions, seeds and number of evaluations for all."""
        batches = -(-config.iterations // config.reuse)
        identity = identity_of(config, *prompts, self.model().base.fingerprint)
        name = f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}-{batches}"
        job = Job(self.model(), prompts.captions, config, self.work.path("recordings", name), prompts.negatives)
        with self.work.locked("recordings", name), tqdm(total=batches, desc="recording", leave=False) as bar:

            def show(progress: Progress) -> None:
                if progress.phase == "record":
                    bar.update(progress.step - bar.n)

            recording = job.record(batches, Callbacks(show))
        return recording, split_prompts(prompts.captions, config)[0]

    # Gap closed and direction cosine.

    def held_out_states(self, rule: GuidanceRule, negatives: bool = False) -> list[list[TrajectoryState]]:
        """Blocks of held-out captions, each with a seed of its own; negative prompts are empty, or held-out ones."""
        if (rule, negatives) not in self._states:
            captions = held_out_captions(self.sizes.gap_captions, _GAP_SEED)[1]
            rng, unwanted = random.Random(_GAP_SEED), [each.text() for each in all_unwanted(held=True)]
            pairs = [(caption, rng.choice(unwanted) if negatives else "") for caption in captions]
            self._states[rule, negatives] = []
            for i, block in enumerate(in_blocks(pairs)):
                texts, unwanted_texts = zip(*block, strict=True)
                how = {"rule": rule, "scheduler": self.base.scheduler, "keep": KEPT_STEPS}
                wanted = CaptionTrajectories(texts, self.sizes.gap_omegas, 100 + i, unwanted_texts, **how)
                self._states[rule, negatives].append(teacher_states(self.model(), wanted))
        return self._states[rule, negatives]

    def gap(self, name: str, method: PreparedMethod, negatives: bool = False) -> dict[str, torch.Tensor]:
        """`gap_closed` and `direction_cosine` (omegas, blocks); `negatives`: away from held-out negative prompts."""
        identity = method.identity | {"omegas": self.sizes.gap_omegas, "rule": dataclasses.asdict(method.rule)}
        identity |= {"blocks": BLOCKS, "captions": self.sizes.gap_captions, "steps": KEPT_STEPS}

        def make() -> dict[str, torch.Tensor]:
            found = [method.evaluate(states) for states in self.held_out_states(method.rule, negatives)]
            return {
                key: torch.tensor([[getattr(e, key)[omega] for e in found] for omega in self.sizes.gap_omegas])
                for key in ("gap_closed", "direction_cosine")
            }

        return self.work.tensors("gaps", f"{name}-negatives" if negatives else name, identity, make)

    # Pictures.

    @functools.cached_property
    def reference(self) -> metrics.Reference:
        """The real, held-out pictures."""

        def make() -> dict[str, torch.Tensor]:
            return {"features": self.scorer.reference, "radii": metrics.radii(self.scorer.reference)}

        return metrics.Reference(**self.work.tensors("samples", "real", {"pictures": "held-out"}, make))

    @functools.cached_property
    def captions(self) -> tuple[list[Scene], list[list]]:
        """What pictures are asked for: held-out scenes, and batches of their encoded captions."""
        scenes, captions = held_out_captions(self.sizes.pictures, _CAPTIONS_SEED)
        return scenes, encode(self.parts.clip, captions)

    @functools.cached_property
    def decoded(self) -> Samples:
        """Drawings of what the captions say, once through the autoencoder."""

        def make() -> dict[str, torch.Tensor]:
            scenes, vae = self.captions[0], self.parts.vae
            drawn = render(scenes, _CAPTIONS_SEED).split(BATCH)
            images = torch.cat([vae.decode(vae.encode(part.movedim(1, -1))).movedim(-1, 1) for part in drawn])
            images = images.clamp(0, 1)
            return {"features": self.scorer.features(images), "correct": self._correct(images)}

        return Samples(**self.work.tensors("samples", "decoded", {"pictures": self.sizes.pictures}, make))

    def _correct(self, images: torch.Tensor) -> torch.Tensor:
        """Which of the first captions' pictures show all that theirs says: bool (n,)."""
        seen, asked = [], self.captions[0][: len(images)]
        for part in images.split(BATCH):
            seen += recognised(self.scorer.judge, part)
        return torch.tensor([found == scene for found, scene in zip(seen, asked, strict=True)])

    def samples(
        self,
        name: str,
        method: PreparedMethod,
        at: SampledAt,
        transform: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
        count: int | None = None,
    ) -> Samples:
        """Of the captions, by this method. `transform` makes of pictures (n, 3, h, w) what the judge is to see, in the
        size that it knows.

        `count`: of the first so many captions, in whole batches, for noise is drawn batch by batch.
        """
        pictures = min(self.sizes.pictures, -(-count // BATCH) * BATCH if count else self.sizes.pictures)
        name = "-".join([setting_name(name, at.omega, at.steps), *map(str, at.named.values())])
        name += f"-first{pictures}" if pictures < self.sizes.pictures else ""

        def make() -> dict[str, torch.Tensor]:
            model, counter = counted(method.model)
            prompts = self.captions[1][: -(-pictures // BATCH)]
            drawn = sample(self.parts, model, prompts, at.settings(_NOISE_SEED, self.base))
            images, rows = as_judged(transform(drawn.images)), [len(batch[0][0]) for batch in prompts]
            return {
                "features": self.scorer.features(images),
                "correct": self._correct(images),
                "latents": drawn.latents,
                "seconds": torch.tensor([spent / n for spent, n in zip(drawn.seconds, rows, strict=True)]),
                "evaluations": torch.tensor(counter.total),
            }

        identity = method.identity | {"omega": at.omega, "steps": at.steps, "pictures": pictures} | at.named
        identity |= {"kept": [each.name for each in dataclasses.fields(Samples)]}
        return Samples(**self.work.tensors("samples", name, identity, make))

    def accuracy_and_distance(self, own: Samples) -> dict[str, tuple[float, float]]:
        """Prompt accuracy and Fréchet distance to real pictures, with their standard errors."""
        return {
            "prompt_accuracy": metrics.mean_and_error(own.correct),
            "frechet_to_real": metrics.frechet(own.features, self.reference.features),
        }

    def distance_to_cfg(
        self, own: Samples, at: SampledAt, base: PreparedMethod | None = None, name: str = ""
    ) -> tuple[float | None, float | None]:
        """How far these are from CFG's own pictures at `TRUE_STEPS` steps of the same sampler, captions and noise, by
        their latents: 0 is CFG's picture, 1 as far as the base's without guidance; and the standard error. Of the first
        `sizes.compared` pictures. Samplers that add noise have none: with other numbers of steps it is other noise.

        `base`: another one than the experiment's, whose files have `name` before theirs.
        """
        if at.adds_noise:
            return None, None
        base = base or PreparedMethod(self.parts.model, {"sampling": {}})
        true, count = dataclasses.replace(at, steps=TRUE_STEPS), self.sizes.compared
        guided = self.samples(f"{name}cfg", base, true, count=count).latents
        unguided = self.samples(f"{name}unguided", base, dataclasses.replace(true, omega=1.0), count=count).latents
        return metrics.relative_distance(own.latents[: len(guided)], guided, unguided)

    # Negative prompts.

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        """Captions that leave attributes open, with a held-out attribute or combination that the base draws there."""
        identity = {"pairs": self.sizes.pairs, "omega": _CHOOSING_OMEGA}
        kept = self.work.data(
            "negatives", "pairs", identity, lambda: [dataclasses.asdict(pair) for pair in self._choose_pairs()]
        )
        return [Pair(each["caption"], each["noise"], Description(**each["unwanted"])) for each in kept]

    def _choose_pairs(self) -> list[Pair]:
        rng, unwanted, found = random.Random(_OPEN_SEED), all_unwanted(held=True), []
        rows = min(BATCH, 2 * self.sizes.pairs)  # about half of them show something held out
        for first in itertools.count(0, rows):
            if len(found) >= self.sizes.pairs:
                break
            drawn = [open_caption(rng) for _ in range(rows)]
            captions, noise = [caption for caption, _ in drawn], range(first, first + rows)
            scenes = self._draw(self.parts.model, SampledAt(_CHOOSING_OMEGA), captions, noise)
            for (caption, described), scene, index in zip(drawn, scenes, noise, strict=True):
                left_open = [u for u in unwanted if u.attributes().keys().isdisjoint(described.attributes())]
                there = [u for u in left_open if shows(scene, u)]
                found += [Pair(caption, index, rng.choice(there))] if there else []
        return found[: self.sizes.pairs]

    def _draw(
        self, model, at: SampledAt, captions: list[str], noise: Sequence[int], negatives: list[str] | None = None
    ) -> list[Scene]:
        """What the judge sees in a batch of pictures."""
        prompts, unwanted = (encode(self.parts.clip, texts) if texts else None for texts in (captions, negatives))
        settings = at.settings(_OPEN_NOISE_SEED, self.base)
        drawn = sample(self.parts, model, prompts, settings, negative=unwanted, noise=[noise])
        return recognised(self.scorer.judge, drawn.images)

    def unwanted(self, name: str, method: PreparedMethod, at: SampledAt) -> metrics.UnwantedSeen:
        """In pictures of the pairs, without and with the negative prompt from the same noise."""

        def make() -> dict[str, torch.Tensor]:
            found = {"without": [], "with": []}
            for first in trange(0, len(self.pairs), BATCH, desc=f"{name}, omega {at.omega:g}, negatives", leave=False):
                own = self.pairs[first : first + BATCH]
                captions, noise = [pair.caption for pair in own], [pair.noise for pair in own]
                for key, negatives in (("without", None), ("with", [pair.unwanted.text() for pair in own])):
                    scenes = self._draw(method.model, at, captions, noise, negatives)
                    found[key] += [shows(scene, pair.unwanted) for scene, pair in zip(scenes, own, strict=True)]
            return {key: torch.tensor(values) for key, values in found.items()}

        identity = method.identity | {"omega": at.omega, "pairs": [dataclasses.asdict(pair) for pair in self.pairs]}
        kept = self.work.tensors("negatives", setting_name(name, at.omega, at.steps), identity, make)
        return metrics.UnwantedSeen(kept["without"], kept["with"])

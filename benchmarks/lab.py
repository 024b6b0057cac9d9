"""The laboratory of `quality.py`: the toy with its prompts, what is recorded, sampled and measured with it, and the
folder where all of that is kept."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import comfy.model_patcher
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm, trange

from comfyui_agd.agd_core.adapter_file import replacing
from comfyui_agd.agd_core.comfyui.counting import counted
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.benchmarks import metrics
from comfyui_agd.examples.toy.judge import recognised
from comfyui_agd.examples.toy.sampling import STEPS, Jury, Toy, captions_of, encode, held_out_captions, sample
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
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.evaluate import Evaluation, Trajectories, TrajectoryState, follow_teacher
from comfyui_agd.training.job import Job
from comfyui_agd.training.recording import Recording, identity_of
from comfyui_agd.training.run_setup import split_prompts

BATCH = 64  # pictures sampled at once, from one seed
TRAINING_BATCH = 16
REUSE = 4  # optimiser steps per recorded batch, each with other guidance scales
BUDGETS = (20, 10, 6)  # evaluations per picture at which methods are compared
BLOCKS, KEPT_STEPS = 8, 10  # gap closed: blocks of captions, noise levels of a trajectory's 20
_TRAINING_SEED, _CHOICE_SEED, _GAP_SEED, _CAPTIONS_SEED, _OPEN_SEED = 3, 61, 29, 37, 43
_NOISE_SEED, _OPEN_NOISE_SEED = 70_000, 90_000
# Which attribute of a picture to forbid is read from the unguided picture, which is the same for every method.
_CHOOSING_OMEGA = 1.0
CFG = GuidanceRule()


@dataclass(frozen=True)
class Sizes:
    """How much is computed. `pictures` per setting, at each of `omegas`; `pairs` of pictures, without and with a
    negative prompt; `iterations` of a training on so many `captions`, with so many batches of trajectories in the
    `pool`; `gap_captions` to measure the gap on, at `gap_omegas`. `tuned`: whether learning rates are tried where a
    method has several, or the last is taken.
    """

    pictures: int = 1024
    pairs: int = 256
    iterations: int = 1200
    omegas: tuple[float, ...] = (2.0, 3.0, 5.0)
    gap_omegas: tuple[float, ...] = (2.0, 3.0, 5.0)
    captions: int = 2000
    pool: int = 8
    gap_captions: int = 64
    tuned: bool = True


QUICK = Sizes(
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


class Work:
    """A folder of results. Each is kept with its identity, what it was made from, and made again when that changes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, kind: str, name: str) -> Path:
        (self.folder / kind).mkdir(parents=True, exist_ok=True)
        return self.folder / kind / name

    @contextlib.contextmanager
    def alone(self, kind: str, name: str) -> Iterator[None]:
        """Only one process at a time; another that wants the same waits, and then finds it."""
        with self.path("locks", f"{kind}-{name}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def tensors(
        self, kind: str, name: str, identity: dict, make: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """What `make` returns, or returned when it was called with this identity."""
        path, identity = self.path(kind, f"{name}.safetensors"), json.loads(json.dumps(identity))
        with self.alone(kind, name):
            if path.exists():
                with safe_open(path, framework="pt") as file:
                    if json.loads(file.metadata()["identity"]) == identity:
                        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
            tensors = make()
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"identity": json.dumps(identity)})
        return tensors

    def save_rows(self, name: str, rows: list[dict]) -> None:
        with replacing(self.path("rows", f"{name}.json")) as temporary:
            Path(temporary).write_text(json.dumps(rows, indent=1) + "\n")

    def rows(self, names: Iterable[str] | None = None) -> list[dict]:
        """All that are saved, or those saved by these names, in their order."""
        known = {file.stem: file for file in sorted((self.folder / "rows").glob("*.json"))}
        files = known.values() if names is None else [known[name] for name in names if name in known]
        return [row for file in files for row in json.loads(file.read_text())]


@dataclass
class Ready:
    """A method that can be sampled. `model` takes omega from the sampler's cfg.

    `identity`: what tells it from its earlier versions; `parameters`: how many were trained; `evaluate`: how it does at
    the states of its teacher, for what is a function of a state; `rule`: that teacher's; `file`: an adapter's.
    """

    model: comfy.model_patcher.ModelPatcher
    identity: dict
    parameters: int = 0
    evaluate: Callable[[Sequence[TrajectoryState]], Evaluation] | None = None
    rule: GuidanceRule = CFG
    file: Path | None = None


class Prompts(NamedTuple):
    """What a training is given to distil from."""

    captions: list[str]
    negatives: list[str]


@dataclass(frozen=True)
class Pair:
    """A caption that leaves attributes open, which of its seed's noises to start from, and what is unwanted there."""

    caption: str
    noise: int
    unwanted: Description


def setting(method: str, omega: float, steps: int = STEPS) -> str:
    """The name of what belongs to it."""
    return f"{method}-omega{omega:g}-steps{steps}"


def in_blocks(items: list) -> list[list]:
    """Spread over as many blocks as standard errors are taken over."""
    return [items[i::BLOCKS] for i in range(min(BLOCKS, len(items)))]


def shows(scene: Scene, unwanted: Description) -> bool:
    return any(unwanted.fits(thing) for thing in scene.things)


class Lab:
    """Everything that methods share: made when it is first needed, kept in the work folder where that saves time."""

    def __init__(self, work: Work, sizes: Sizes):
        self.work, self.sizes = work, sizes
        self.parts, self.jury = Toy.load(), Jury()
        self.base_parameters = sum(p.numel() for p in self.parts.model.model.diffusion_model.parameters())
        self._states: dict[tuple[GuidanceRule, bool], list[list[TrajectoryState]]] = {}

    def host(self, width: int | None = None) -> ComfyModel:
        """`width`: adapters are for the sites of so many channels only."""
        model = ComfyModel(self.parts.model, self.parts.clip)
        sites = tuple(site for site in model.base.sites if width in (None, site.width))
        model.base = dataclasses.replace(model.base, sites=sites)
        return model

    # Training: what all trained methods have in common.

    def train_config(self, **settings) -> TrainConfig:
        common = {
            "iterations": self.sizes.iterations,
            "batch": TRAINING_BATCH,
            "learning_rate": 2e-3,
            "omega_max": 6.0,
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
        return TrainConfig(**common | settings)

    def training_captions(self, *, partial: bool = False) -> list[str]:
        """`partial`: a quarter of them leave something open, like those that the base was trained with."""
        scenes, rng = draw_scenes(self.sizes.captions, _TRAINING_SEED, held=False), random.Random(_TRAINING_SEED)
        return [training_caption(scene, rng) for scene in scenes] if partial else captions_of(scenes)

    @functools.cached_property
    def choice_captions(self) -> list[str]:
        """To choose between learning rates with."""
        return held_out_captions(16, _CHOICE_SEED)[1]

    def prompts(self, *, negatives: bool, partial: bool = False) -> Prompts:
        """Of a training. `negatives`: the toy's own too, or only empty ones; `partial`: as for `training_captions`."""
        return Prompts(self.training_captions(partial=partial), training_negatives() if negatives else [""])

    def recording(self, config: TrainConfig, prompts: Prompts) -> tuple[Recording, list[str]]:
        """The teacher's trajectories for this config, and the captions in the order in which it counts them: the same
        captions, seeds and number of evaluations for all."""
        batches = -(-config.iterations // config.reuse)
        identity = identity_of(config, *prompts, self.host().base.fingerprint)
        name = f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}-{batches}"
        job = Job(self.host(), prompts.captions, config, self.work.path("recordings", name), prompts.negatives)
        with self.work.alone("recordings", name), tqdm(total=batches, desc="recording", leave=False) as bar:
            recording = job.record(batches, lambda done, total: bar.update(done - bar.n))
        return recording, split_prompts(prompts.captions, config)[0]

    # Gap closed and direction cosine.

    def follow(
        self,
        captions: list[str],
        omegas: Sequence[float],
        rule: GuidanceRule,
        seed: int,
        negatives: Sequence[str] = (),
        *,
        model: ComfyModel | None = None,
        size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE),
        **how,
    ) -> list[TrajectoryState]:
        """States on the teacher's trajectories away from a negative prompt each, by default the empty one.

        `model`: of another base; `size`: width and height in pixels; `how`: of the trajectories.
        """
        model = model or self.host()
        denoiser, encode_with = model.denoiser, model.text_encoder.encode
        positive, negative = encode_with(captions), encode_with(list(negatives) or [""] * len(captions), "negative")
        how = {"steps": STEPS, "keep": KEPT_STEPS, "seed": seed, "rule": rule} | how
        trajectories = Trajectories(denoiser.latent_shape(*size), omegas, **how)
        with denoiser.session():
            return follow_teacher(denoiser, positive, negative, trajectories, batch=len(captions))

    def states(self, rule: GuidanceRule, negatives: bool = False) -> list[list[TrajectoryState]]:
        """Blocks of held-out captions, each with a seed of its own; negative prompts are empty, or held-out ones."""
        if (rule, negatives) not in self._states:
            captions = held_out_captions(self.sizes.gap_captions, _GAP_SEED)[1]
            rng, unwanted = random.Random(_GAP_SEED), [each.text() for each in all_unwanted(held=True)]
            pairs = [(caption, rng.choice(unwanted) if negatives else "") for caption in captions]
            self._states[rule, negatives] = [
                self.follow([c for c, _ in block], self.sizes.gap_omegas, rule, 100 + i, [n for _, n in block])
                for i, block in enumerate(in_blocks(pairs))
            ]
        return self._states[rule, negatives]

    def gap(self, method: str, ready: Ready, negatives: bool = False) -> dict[str, torch.Tensor]:
        """`gap_closed` and `direction_cosine` (omegas, blocks); `negatives`: away from held-out negative prompts."""
        identity = ready.identity | {"omegas": self.sizes.gap_omegas, "rule": dataclasses.asdict(ready.rule)}
        identity |= {"blocks": BLOCKS, "captions": self.sizes.gap_captions, "steps": KEPT_STEPS}

        def make() -> dict[str, torch.Tensor]:
            found = [ready.evaluate(states) for states in self.states(ready.rule, negatives)]
            return {
                key: torch.tensor([[getattr(e, key)[omega] for e in found] for omega in self.sizes.gap_omegas])
                for key in ("gap_closed", "direction_cosine")
            }

        return self.work.tensors("gaps", f"{method}-negatives" if negatives else method, identity, make)

    # Pictures.

    @functools.cached_property
    def reference(self) -> dict[str, torch.Tensor]:
        """The real, held-out pictures: their `features` and `radii`."""

        def make() -> dict[str, torch.Tensor]:
            return {"features": self.jury.reference, "radii": metrics.radii(self.jury.reference)}

        return self.work.tensors("samples", "real", {"pictures": "held-out"}, make)

    @functools.cached_property
    def captions(self) -> tuple[list[Scene], list[list]]:
        """What pictures are asked for: held-out scenes, and batches of their encoded captions."""
        scenes, captions = held_out_captions(self.sizes.pictures, _CAPTIONS_SEED)
        return scenes, encode(self.parts.clip, captions)

    @functools.cached_property
    def decoded(self) -> dict[str, torch.Tensor]:
        """As `pictures`: drawings of what the captions say, once through the autoencoder."""

        def make() -> dict[str, torch.Tensor]:
            scenes, vae = self.captions[0], self.parts.vae
            drawn = render(scenes, _CAPTIONS_SEED).split(BATCH)
            images = torch.cat([vae.decode(vae.encode(part.movedim(1, -1))).movedim(-1, 1) for part in drawn])
            images = images.clamp(0, 1)
            return {"features": self.jury.features(images), "correct": self._correct(images)}

        return self.work.tensors("samples", "decoded", {"pictures": self.sizes.pictures}, make)

    def _correct(self, images: torch.Tensor) -> torch.Tensor:
        """Which of the captions' pictures show all that theirs says: bool (n,)."""
        seen = [scene for part in images.split(BATCH) for scene in recognised(self.jury.judge, part)]
        return torch.tensor([found == asked for found, asked in zip(seen, self.captions[0], strict=True)])

    def pictures(
        self,
        method: str,
        ready: Ready,
        omega: float,
        steps: int,
        *,
        shown: Callable[[torch.Tensor], torch.Tensor] = lambda images: images,
        **how: str,
    ) -> dict[str, torch.Tensor]:
        """The judge's `features` (n, d) of the pictures and whether each is `correct` in all (n,); `seconds` per
        picture, of each batch; `evaluations`: the rows that the UNet was given.

        `how`: another `sampler` or `scheduler`. `shown` makes of pictures (n, 3, h, w) what the judge is to see.
        """
        name = "-".join([setting(method, omega, steps), *how.values()])

        def make() -> dict[str, torch.Tensor]:
            model, counter = counted(ready.model)
            images, seconds = [], []
            for i, batch in enumerate(tqdm(self.captions[1], desc=name, leave=False)):
                drawn, spent = sample(self.parts, model, [batch], cfg=omega, seed=_NOISE_SEED + i, steps=steps, **how)
                images.append(shown(drawn))
                seconds.append(spent / len(drawn))
            images = torch.cat(images)
            return {
                "features": self.jury.features(images),
                "correct": self._correct(images),
                "seconds": torch.tensor(seconds),
                "evaluations": torch.tensor(counter.total),
            }

        identity = ready.identity | {"omega": omega, "steps": steps, "pictures": self.sizes.pictures} | how
        return self.work.tensors("samples", name, identity, make)

    @functools.cached_property
    def pairs(self) -> list[Pair]:
        """Captions that leave attributes open, with a held-out attribute or combination that the base draws there."""
        identity = {"pairs": self.sizes.pairs, "omega": _CHOOSING_OMEGA}
        path = self.work.path("negatives", "pairs.json")
        with self.work.alone("negatives", "pairs"):
            if path.exists() and (kept := json.loads(path.read_text()))["identity"] == identity:
                return [Pair(p["caption"], p["noise"], Description(**p["unwanted"])) for p in kept["pairs"]]
            found = self._choose_pairs()
            data = {"identity": identity, "pairs": [dataclasses.asdict(pair) for pair in found]}
            with replacing(path) as temporary:
                Path(temporary).write_text(json.dumps(data))
        return found

    def _choose_pairs(self) -> list[Pair]:
        rng, unwanted, found = random.Random(_OPEN_SEED), all_unwanted(held=True), []
        rows = min(BATCH, 2 * self.sizes.pairs)  # about half of them show something held out
        for first in itertools.count(0, rows):
            if len(found) >= self.sizes.pairs:
                break
            drawn = [open_caption(rng) for _ in range(rows)]
            captions, noise = [caption for caption, _ in drawn], range(first, first + rows)
            scenes = self._draw(self.parts.model, _CHOOSING_OMEGA, captions, noise)
            for (caption, said), scene, index in zip(drawn, scenes, noise, strict=True):
                open_to = [u for u in unwanted if u.said().keys().isdisjoint(said.said())]
                there = [u for u in open_to if shows(scene, u)]
                found += [Pair(caption, index, rng.choice(there))] if there else []
        return found[: self.sizes.pairs]

    def _draw(
        self, model, omega: float, captions: list[str], noise: Sequence[int], negatives: list[str] | None = None
    ) -> list[Scene]:
        """What the judge sees in a batch of pictures."""
        prompts, unwanted = (encode(self.parts.clip, texts) if texts else None for texts in (captions, negatives))
        how = {"cfg": omega, "seed": _OPEN_NOISE_SEED, "negative": unwanted, "noise": [noise]}
        return recognised(self.jury.judge, sample(self.parts, model, prompts, **how)[0])

    def unwanted(self, method: str, ready: Ready, omega: float) -> dict[str, torch.Tensor]:
        """Whether the unwanted is seen `without` and `with` the negative prompt, from the same noise: bool (pairs,)."""

        def make() -> dict[str, torch.Tensor]:
            found = {"without": [], "with": []}
            for first in trange(0, len(self.pairs), BATCH, desc=f"{method}, omega {omega:g}, negatives", leave=False):
                own = self.pairs[first : first + BATCH]
                captions, noise = [pair.caption for pair in own], [pair.noise for pair in own]
                for key, negatives in (("without", None), ("with", [pair.unwanted.text() for pair in own])):
                    scenes = self._draw(ready.model, omega, captions, noise, negatives)
                    found[key] += [shows(scene, pair.unwanted) for scene, pair in zip(scenes, own, strict=True)]
            return {key: torch.tensor(values) for key, values in found.items()}

        identity = ready.identity | {"omega": omega, "pairs": [dataclasses.asdict(pair) for pair in self.pairs]}
        return self.work.tensors("negatives", setting(method, omega), identity, make)

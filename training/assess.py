"""How good an adapter is on the user's own model and prompts: what `agd evaluate` and AGD Evaluate report."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from PIL import Image, ImageChops

from ..agd_core.adapter import Adapter
from ..agd_core.adapter_file import AdapterInfo, check_base
from ..agd_core.guidance import GapErrors, square_norm
from ..agd_core.mixed_precision import MixedPrecision
from ..agd_core.seeds import LARGEST_SEED, seeded_generator
from .assessment_report import METHODS, Assessment, Cost, OmegaResult, SigmaResult, Transfer
from .config import TrainConfig
from .estimate import Estimate, mean, mean_of, of_sums, ratio_of_sums, share_closed_of, weighted_sum
from .gap import Trajectories, TrajectoryState, errors_by_omega, follow_teacher, omegas_of, predict
from .memory import retry_on_oom
from .model import Model, ProgressCallback, Prompt, Shape, encode
from .options import Settings, option
from .plan import rows_that_fit
from .plot import contact_sheet
from .presets import settings_for
from .progress import Progress
from .trainer import Callbacks

_SMALLEST_SIDE = 64  # pixels
_KEPT_STEPS = 8  # of the measured trajectories', as in training
_ROWS = 4  # evaluated at once, if they fit
_WARM_UP = 2  # steps by every method before any is timed
_EVALUATIONS = {"unguided": 1, "guided": 2, "agd": 1}  # of a step by each of `METHODS`, about
_SHOWN = 6  # images of each method in the picture
_LEARNT = (
    *("teacher", "interval_sigma_min", "interval_sigma_max", "rescale_phi", "apg_eta", "apg_threshold"),
    *("sigma_from", "sigma_to", "frames"),
)


class Sampler(Protocol):
    """Whole samples. `agd_core.comfyui.model.sampler` is the one implementation.

    `method` is one of `METHODS`; noise (1, c, h, w) -> a latent of that shape, and the evaluations (rows) it took.
    `prompts`: positive and negative; `progress` is called at every step. `notes`: what the adapter's user should know,
    known when all is sampled.
    """

    @property
    def notes(self) -> Sequence[str]: ...

    def __call__(
        self,
        method: str,
        noise: torch.Tensor,
        prompts: tuple[Prompt, Prompt],
        *,
        omega: float,
        steps: int,
        progress: Callable[[], None],
    ) -> tuple[torch.Tensor, int]: ...


@dataclass(frozen=True)
class AssessConfig(Settings):
    """What is measured. Without `omegas`: those that the adapter's training was measured at."""

    refusal = "This can't be evaluated"

    omegas: tuple[float, ...] = option(
        (),
        "guidance scales (cfg) to measure at; default: those that the adapter's training was measured at",
        limits=(1.01, 100.0),
        called="omega",
    )
    steps: int = option(20, "sampling steps", limits=(1, 1000))
    count: int = option(
        8, "images by each method; the prompts take turns, each time with another seed", limits=(1, 10_000)
    )
    seed: int = option(0, "of the first image's noise; the next one's is one higher", limits=(0, LARGEST_SEED))
    width: int = option(0, "in pixels; 0: as the adapter was trained", limits=(0, 16_384))
    height: int = option(0, "in pixels; 0: as the adapter was trained", limits=(0, 16_384))

    def contradictions(self) -> Iterator[str]:
        for name in ("width", "height"):
            if 0 < getattr(self, name) < _SMALLEST_SIDE:
                yield f"{name} is {getattr(self, name)}, but must be {_SMALLEST_SIDE} or more"


def learnt_by(info: AdapterInfo) -> TrainConfig:
    """What an adapter learnt, by its file: the teacher's rule, the noise levels, the frames of a video; or else plain
    CFG everywhere, of one frame. The other settings are the usual ones. Raises `ValueError` for none such.
    """
    settings = info.training.get("config", {})
    try:
        return TrainConfig(**{name: settings[name] for name in _LEARNT if name in settings})
    except ValueError as error:
        raise ValueError(f"The adapter's file says of a training that there can't be: {error}") from error


@dataclass(frozen=True)
class Candidate:
    """The adapter to assess; `source` is its name in the report."""

    info: AdapterInfo
    weights: dict[str, torch.Tensor]
    source: str

    def adapter(self) -> Adapter:
        adapter = Adapter(self.info.config, MixedPrecision)
        adapter.load_state_dict(self.weights)
        return adapter


@dataclass(frozen=True)
class PromptTexts:
    """`positive` and `negative` take turns."""

    positive: Sequence[str]
    negative: Sequence[str] = ("",)

    def pairs(self, count: int) -> list[tuple[str, str]]:
        """Raises `ValueError` where there are no prompts."""
        positive = [prompt.strip() for prompt in self.positive if prompt.strip()]
        if not positive:
            raise ValueError("There are no prompts to evaluate with; give at least one line of text.")
        return [(positive[i % len(positive)], self.negative[i % len(self.negative)]) for i in range(count)]


def assess(
    model: Model,
    sampler: Sampler,
    candidate: Candidate,
    prompts: PromptTexts,
    config: AssessConfig = AssessConfig(),
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Assessment:
    """Measure an adapter on the model's base.

    Raising from `progress`, which is called after every evaluation, stops it. Raises `AdapterFileError` where the
    adapter is of another kind of base.
    """
    info, of_phase = candidate.info, Callbacks(on_progress=progress).of_phase
    check_base(info, model.base, candidate.source)
    texts = prompts.pairs(config.count)
    trajectories = _trajectories(model, info, config)
    if not trajectories.can_measure(model.denoiser):
        raise ValueError(
            f"None of {config.steps} sampling steps is at a noise level that the adapter learnt to guide at"
            f"{_noise_levels(info)}: evaluate with more steps."
        )
    lists = [("positive", [text for text, _ in texts]), ("negative", [text for _, text in texts])]
    positive, negative = encode(model.text_encoder, lists, of_phase("encode"))
    pairs = list(zip(positive, negative, strict=True))
    measured = _measure_gaps(model, candidate.adapter(), pairs, trajectories, of_phase)
    samples = _Samples(sampler, pairs, trajectories, of_phase("sample"))
    samples.draw_all()
    teacher = trajectories.rule.name.replace("_", " ").upper()
    gaps = [found.gap_closed for found in measured.values()]
    return Assessment(
        adapter=candidate.source,
        base=model.base.describe(),
        teacher=teacher,
        images=config.count,
        prompts=len({text for text, _ in texts}),
        steps=config.steps,
        latent=trajectories.shape[-2:],
        frames=learnt_by(info).frames,
        by_omega={omega: found.with_distance(samples.distance(omega)) for omega, found in measured.items()},
        costs=samples.costs(),
        speedup=samples.speedup(),
        transfer=Transfer(_same_weights(model, info), mean_of(gaps), _reported(info, trajectories.omegas)),
        notes=[*_notes(model, info), *sampler.notes],
        picture=_picture(model, [text for text, _ in texts], samples.shown, teacher, _middle(trajectories.omegas)),
    )


def _trajectories(model: Model, info: AdapterInfo, config: AssessConfig) -> Trajectories:
    learnt = learnt_by(info)
    return Trajectories(
        _shape(model, info, config),
        _omegas(info, config),
        rule=learnt.rule,
        steps=config.steps,
        keep=min(_KEPT_STEPS, config.steps) if learnt.learns_everywhere else None,
        seed=config.seed,
        where=learnt.learns_at,
    )


def _noise_levels(info: AdapterInfo) -> str:
    """Those of its training, such as ", from 0.875 up"; "" where it was of all."""
    learnt = learnt_by(info)
    if learnt.learns_everywhere:
        return ""
    if not learnt.sigma_to:
        return f", from {learnt.sigma_from:g} up"
    return f", below {learnt.sigma_to:g}" + (f" and from {learnt.sigma_from:g} up" if learnt.sigma_from else "")


def _shape(model: Model, info: AdapterInfo, config: AssessConfig) -> Shape:
    """Of a latent: the size that was chosen, or else the first one of the training."""
    suited, latent_shape = settings_for(model.base, {}), model.denoiser.latent_shape
    width, height = suited.width, suited.height
    if info.resolutions:  # of latents
        *_, rows, columns = latent_shape(width, height)
        height, width = info.resolutions[0][0] * height // rows, info.resolutions[0][1] * width // columns
    return latent_shape(config.width or width, config.height or height)


def _gap_of_training(info: AdapterInfo) -> dict[float, Estimate]:
    """Gap closed by omega, as the training reports it; files of earlier versions give no standard error."""
    values, errors = (info.training.get(name, {}) for name in ("gap_closed", "gap_closed_se"))
    return {float(omega): Estimate(value, errors.get(omega)) for omega, value in values.items()}


def _omegas(info: AdapterInfo, config: AssessConfig) -> list[float]:
    low, high = info.omega_range
    usual = _gap_of_training(info) or omegas_of(TrainConfig(omega_min=low, omega_max=high))
    return sorted(set(config.omegas or usual))


def _middle(omegas: Sequence[float]) -> float:
    """The one whose samples are shown."""
    return omegas[len(omegas) // 2]


@dataclass(frozen=True)
class _Gap:
    """What was measured at one omega on the teacher's trajectories; `by_sigma`: where the teacher guides."""

    gap_closed: Estimate
    direction_cosine: Estimate
    by_sigma: list[SigmaResult]

    def with_distance(self, distance: Estimate) -> OmegaResult:
        return OmegaResult(self.gap_closed, self.direction_cosine, self.by_sigma, distance)


def _measure_gaps(
    model: Model,
    adapter: Adapter,
    prompts: list[tuple[Prompt, Prompt]],
    trajectories: Trajectories,
    of_phase: Callable[[str], ProgressCallback],
) -> dict[float, _Gap]:
    """By omega. `prompts`: positive and negative of each image."""
    denoiser, rows = model.denoiser, min(_ROWS, len(prompts))
    positive, negative = [each for each, _ in prompts], [each for _, each in prompts]

    def measure(rows: int) -> tuple[list[TrajectoryState], list[torch.Tensor]]:
        states = follow_teacher(denoiser, positive, negative, trajectories, rows, of_phase("teacher"))
        return states, predict(denoiser, adapter.to(denoiser.device), states, of_phase("measure"))

    # The adapter is evaluated, too: its weights, and what it computes with, which is less than them.
    prompt = max((each for pair in prompts for each in pair), key=model.text_encoder.bytes_of)
    beside = 2 * sum(parameter.nbytes for parameter in adapter.parameters())
    rows, reserve = rows_that_fit(model, trajectories.shape, prompt, rows, model.memory.available(), beside)
    with denoiser.session(memory=reserve):
        (states, students), _ = retry_on_oom(model.memory, "the evaluation", measure, rows)
    return {omega: _gap_of(levels) for omega, levels in errors_by_omega(states, students).items()}


def _gap_of(levels: dict[float, GapErrors]) -> _Gap:
    """`levels`: sigma -> the errors, (images,) each."""
    # (images, levels) each
    remaining, total, cosine = (torch.stack(parts, dim=1).double() for parts in zip(*levels.values(), strict=True))
    by_sigma = [
        SigmaResult(sigma, share_closed_of(remaining[:, i], total[:, i]), mean(cosine[:, i]))
        for i, sigma in enumerate(levels)
        if total[:, i].sum() > 0
    ]
    return _Gap(share_closed_of(remaining.sum(1), total.sum(1)), mean(cosine.nanmean(1)), by_sigma)


class _Samples:
    """Whole samples by every method, from equal noise: how far apart they are and what they cost.

    `shown`: latents by method, of the first images at the middle omega.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: list[tuple[Prompt, Prompt]],
        trajectories: Trajectories,
        progress: ProgressCallback,
    ):
        """`trajectories`: their shape, omegas, steps and seed are the samples'."""
        self.sampler, self.prompts, self.trajectories, self.progress = sampler, prompts, trajectories, progress
        self.shown: list[dict[str, torch.Tensor]] = []
        self._seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        self._rows: dict[str, list[int]] = {method: [] for method in METHODS}
        # Squared distances to the teacher's sample by omega: of the adapter's and of the unguided one.
        self._apart: dict[float, list[torch.Tensor]] = {omega: [] for omega in trajectories.omegas}
        self._evaluated, each = 0, _EVALUATIONS
        of_image = trajectories.steps * (each["unguided"] + (each["guided"] + each["agd"]) * len(trajectories.omegas))
        self._total = sum(each.values()) * _WARM_UP + len(prompts) * of_image

    def draw_all(self) -> None:
        omegas, count = self.trajectories.omegas, len(self.prompts)
        self.progress(0, self._total)
        for method in METHODS:  # the first time everything takes longer
            self._draw(method, 0, omegas[0], _WARM_UP)
            self._seconds[method].clear()
            self._rows[method].clear()
        for image in range(count):
            unguided = self._draw("unguided", image, omegas[0], self.trajectories.steps)
            for omega in omegas:
                guided, agd = (self._draw(each, image, omega, self.trajectories.steps) for each in ("guided", "agd"))
                distances = square_norm(agd - guided), square_norm(unguided - guided)
                self._apart[omega].append(torch.cat(distances).double())
                if omega == _middle(omegas) and image < _SHOWN:
                    self.shown.append({"unguided": unguided, "guided": guided, "agd": agd})

    def _draw(self, method: str, image: int, omega: float, steps: int) -> torch.Tensor:
        generator = seeded_generator(self.trajectories.seed + image)
        noise, start = torch.randn(1, *self.trajectories.shape, generator=generator), time.perf_counter()
        count_step = functools.partial(self._count_step, method)
        latent, evaluations = self.sampler(
            method, noise, self.prompts[image], omega=omega, steps=steps, progress=count_step
        )
        self._seconds[method].append(time.perf_counter() - start)
        self._rows[method].append(evaluations)
        return latent

    def _count_step(self, method: str) -> None:
        self._evaluated += _EVALUATIONS[method]
        self.progress(self._evaluated, self._total)

    def costs(self) -> dict[str, Cost]:
        return {
            method: Cost(mean(self._seconds_of(method)), sum(rows) / len(rows) / self.trajectories.steps)
            for method, rows in self._rows.items()
        }

    def speedup(self) -> Estimate:
        """How many times as fast as the teacher the adapter is: both sample the same images, in turn."""
        return ratio_of_sums(self._seconds_of("guided"), self._seconds_of("agd"))

    def _seconds_of(self, method: str) -> torch.Tensor:
        """(images,), of each the mean over the omegas."""
        return torch.tensor(self._seconds[method], dtype=torch.float64).view(len(self.prompts), -1).mean(1)

    def distance(self, omega: float) -> Estimate:
        """To the teacher's samples, over that of the unguided ones."""
        return of_sums(torch.sqrt, *torch.stack(self._apart[omega], dim=1))


def _same_weights(model: Model, info: AdapterInfo) -> bool | None:
    """None for an adapter that was trained on none, or doesn't say."""
    return info.base.fingerprint == model.base.fingerprint if info.base.fingerprint else None


def _reported(info: AdapterInfo, omegas: Sequence[float]) -> Estimate | None:
    """The mean of what the training reports at these omegas; in between, linear in log omega."""
    then = sorted(_gap_of_training(info).items())
    return mean_of([_between(then, omega) for omega in omegas]) if then else None


def _between(points: Sequence[tuple[float, Estimate]], omega: float) -> Estimate:
    for (low, estimate), (high, next_estimate) in pairwise(points):
        if low <= omega <= high:
            share = math.log(omega / low) / math.log(high / low)
            return weighted_sum([(estimate, 1 - share), (next_estimate, share)])
    return points[0][1] if omega < points[0][0] else points[-1][1]


def _notes(model: Model, info: AdapterInfo) -> list[str]:
    return [*_note_of_noise_levels(info), *_note_of_patches(model, info)]


def _note_of_noise_levels(info: AdapterInfo) -> list[str]:
    levels = _noise_levels(info)
    if not levels:
        return []
    return [
        f"The adapter learnt a part of the noise levels{levels}: gap closed is measured there alone, and the samples "
        "have this model's own CFG elsewhere. Of two experts, this one takes the other's steps, too."
    ]


def _note_of_patches(model: Model, info: AdapterInfo) -> list[str]:
    then, now = (
        patches.get("patched_weights", 0) for patches in (info.training.get("base_patches", {}), model.base_patches)
    )
    if then == now:
        return []
    return [f"LoRAs and the like patch {now} weights of this model, but {then} of the one it was trained on."]


def _picture(
    model: Model, prompts: Sequence[str], shown: Sequence[dict[str, torch.Tensor]], teacher: str, omega: float
) -> Image.Image:
    rows = []
    for prompt, latents in zip(prompts, shown, strict=False):
        images = [model.picture(latents[method]) for method in METHODS]
        rows.append((prompt, [*images, ImageChops.subtract(images[2], images[1], offset=128)]))
    return contact_sheet(("unguided", f"{teacher} {omega:g}", f"AGD {omega:g}", f"AGD - {teacher} (grey: equal)"), rows)

"""How good an adapter is on the user's own model and prompts: what `agd evaluate` and AGD Evaluate tell."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from PIL import Image, ImageChops

from ..agd_core.adapter import Adapter
from ..agd_core.adapter_file import AdapterInfo, check_base
from ..agd_core.guidance import GuidanceRule, square_norm
from ..agd_core.mixed_precision import MixedPrecision
from .assessment import METHODS, Assessment, Closeness, Cost, Estimate, Level, Transfer
from .config import TrainConfig, option
from .evaluate import State, follow_teacher, omegas_of, predict
from .fitting import as_fits
from .host import Host, Prompt, encode
from .plot import contact_sheet
from .presets import settings_for
from .trainer import Progress

_LEAST = {"steps": 1, "count": 1, "width": 64, "height": 64}
_KEPT_STEPS = 8  # of the measured trajectories', as in training
_ROWS = 4  # evaluated at once, if they fit
_WARM_UP = 2  # steps by every method before any is timed
_SHOWN = 6  # images of each method in the picture
_RULE = ("teacher", "interval_sigma_min", "interval_sigma_max", "rescale_phi", "apg_eta", "apg_threshold")


class Sampler(Protocol):
    """Whole samples. `agd_core.comfyui.model.sampler` is the one implementation.

    `method` is one of `METHODS`; noise (1, c, h, w) -> a latent of that shape, and the evaluations (rows) it took.
    `progress` is called at every step. `notes`: what the adapter's user should know, known when all is sampled.
    """

    notes: Sequence[str]

    def __call__(
        self,
        method: str,
        noise: torch.Tensor,
        prompt: Prompt,
        negative: Prompt,
        *,
        omega: float,
        steps: int,
        progress: Callable[[], None],
    ) -> tuple[torch.Tensor, int]: ...


@dataclass(frozen=True)
class AssessConfig:
    """What is measured. Without `omegas`: those that the adapter's training was measured at."""

    omegas: tuple[float, ...] = ()
    steps: int = option(20, "of every sample")
    count: int = option(8, "images by each method; the prompts take turns, each time with another seed")
    seed: int = option(0, "of the first image's noise; the next one's is one higher")
    width: int = option(0, "of the images, in pixels; 0: as the adapter was trained")
    height: int = option(0, "of the images, in pixels; 0: as the adapter was trained")

    def __post_init__(self):
        values = {name: getattr(self, name) for name in _LEAST}
        given = {name: value for name, value in values.items() if value or name in ("steps", "count")}
        wrong = [f"{name} is {v}, but must be {_LEAST[name]} or more" for name, v in given.items() if v < _LEAST[name]]
        wrong += [f"cfg is {omega:g}, but guidance begins above 1" for omega in self.omegas if not omega > 1]
        if wrong:
            raise ValueError(f"This can't be evaluated: {'; '.join(wrong)}.")


def rule_of(info: AdapterInfo) -> GuidanceRule:
    """The guidance that an adapter learnt: what its file says, or plain CFG."""
    settings = info.training.get("config", {})
    return TrainConfig(**{name: settings[name] for name in _RULE if name in settings}).rule


def assess(
    host: Host,
    sampler: Sampler,
    info: AdapterInfo,
    state: dict[str, torch.Tensor],
    prompts: Sequence[str],
    config: AssessConfig = AssessConfig(),
    *,
    source: str,
    negative: Sequence[str] = ("",),
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Assessment:
    """Measure an adapter, its `info` and `state`, on the host's base.

    `prompts` and `negative` take turns; `source` names the adapter. Raising from `progress`, which is called after
    every evaluation, stops it. Raises `AdapterFileError` where the adapter is of another kind of base.
    """
    check_base(info, host.base, source)
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("There are no prompts to evaluate with; give at least one line of text.")
    shape, rule, omegas = _shape(host, info, config), rule_of(info), _omegas(info, config)
    turns = [(prompts[i % len(prompts)], negative[i % len(negative)]) for i in range(config.count)]

    def told(phase: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(Progress(phase, done, total))

    encoded = [
        encode(host, texts, kind, told("encode"))
        for texts, kind in zip(zip(*turns, strict=True), ("positive", "negative"), strict=True)
    ]
    adapter = Adapter(info.config, MixedPrecision)
    adapter.load_state_dict(state)

    def measured(rows: int) -> tuple[list[State], list[torch.Tensor]]:
        settings = {"rule": rule, "steps": config.steps, "keep": min(_KEPT_STEPS, config.steps), "seed": config.seed}
        states = follow_teacher(host, *encoded, shape, omegas, **settings, batch=rows, progress=told("teacher"))
        return states, predict(host, adapter.to(host.device), states, told("adapter"))

    with host.session():
        (states, students), _ = as_fits(host, "the evaluation", measured, min(_ROWS, config.count))
    gaps, cosines, levels = _gaps(states, students)
    costs, distances, shown = _sample(sampler, *encoded, shape, omegas, config, told("sample"))
    teacher = rule.name.replace("_", " ").upper()
    return Assessment(
        adapter=source,
        base=host.base.describe(),
        teacher=teacher,
        images=config.count,
        prompts=len({positive for positive, _ in turns}),
        steps=config.steps,
        latent=shape[1:],
        by_omega={omega: Closeness(gaps[omega], cosines[omega], levels[omega], distances[omega]) for omega in omegas},
        costs=costs,
        transfer=Transfer(_same_weights(host, info), _mean_of(gaps.values()), _reported(info, omegas)),
        notes=[*_notes(host, info), *sampler.notes],
        picture=_picture(host, [positive for positive, _ in turns], shown, teacher, _middle(omegas)),
    )


def _shape(host: Host, info: AdapterInfo, config: AssessConfig) -> tuple[int, int, int]:
    """Of a latent: the size that was chosen, or else the first one of the training."""
    suited = settings_for(host.base, {})
    channels, height, width = host.latent_shape(config.width or suited.width, config.height or suited.height)
    trained = info.resolutions[0] if info.resolutions else (height, width)
    return channels, height if config.height else trained[0], width if config.width else trained[1]


def _measured_then(info: AdapterInfo) -> dict[float, float]:
    """Gap closed by omega, as the training reports it."""
    return {float(omega): value for omega, value in info.training.get("gap_closed", {}).items()}


def _omegas(info: AdapterInfo, config: AssessConfig) -> list[float]:
    low, high = info.omega_range
    usual = _measured_then(info) or omegas_of(TrainConfig(omega_min=low, omega_max=high))
    return sorted(set(config.omegas or usual))


def _middle(omegas: Sequence[float]) -> float:
    """The one whose samples are shown."""
    return omegas[len(omegas) // 2]


def _of_sums(function: Callable[[torch.Tensor], torch.Tensor], now: torch.Tensor, before: torch.Tensor) -> Estimate:
    """function(sum now / sum before), with the jackknife's standard error: now and before (images,)."""
    value, images = function(now.sum() / before.sum()).item(), len(now)
    rest = before.sum() - before
    if images < 2 or not (rest > 0).all():
        return Estimate(value, None)
    without = function((now.sum() - now).clamp_min(0) / rest)  # each image left out in turn
    return Estimate(value, math.sqrt((images - 1) * without.var(correction=0).item()))


def _mean(values: torch.Tensor) -> Estimate:
    """values (images,); an image that has none is NaN."""
    values = values[~values.isnan()]
    return Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None)


def _mean_of(estimates: Iterable[Estimate]) -> Estimate:
    """Of the same images under several omegas, so that the errors don't average out."""
    values, errors = zip(*((estimate.value, estimate.se) for estimate in estimates), strict=True)
    return Estimate(sum(values) / len(values), None if None in errors else sum(errors) / len(errors))


def _gaps(
    states: Sequence[State], students: Sequence[torch.Tensor]
) -> tuple[dict[float, Estimate], dict[float, Estimate], dict[float, list[Level]]]:
    """Gap closed, direction cosine, and both by noise level where the teacher guides, all by omega.

    Raises `ValueError` where there is no guidance at all.
    """
    found: dict[float, dict[float, list]] = {}  # omega -> sigma -> errors of each batch
    for state, student in zip(states, students, strict=True):
        found.setdefault(state.omega, {}).setdefault(state.sigma, []).append(_errors(student, state))
    gaps, cosines, levels = {}, {}, {}
    for omega, at_sigma in found.items():
        # now, before and cosine: (images, levels)
        now, before, cosine = torch.stack([torch.cat(batches, dim=1) for batches in at_sigma.values()], dim=2)
        if before.sum() == 0:
            raise ValueError(
                "Guidance changes nothing here, so it can't be measured: negative prompts equal the prompts."
            )
        gaps[omega], cosines[omega] = _of_sums(_closed, now.sum(1), before.sum(1)), _mean(cosine.nanmean(1))
        levels[omega] = [
            Level(sigma, _of_sums(_closed, now[:, i], before[:, i]), _mean(cosine[:, i]))
            for i, sigma in enumerate(at_sigma)
            if before[:, i].sum() > 0
        ]
    return gaps, cosines, levels


def _closed(still_open: torch.Tensor) -> torch.Tensor:
    return 1 - still_open


def _errors(student: torch.Tensor, state: State) -> torch.Tensor:
    """(3, b): the squared gap now and without adapter, and the direction cosine, NaN where there is no gap."""
    added, wanted = student - state.cond, state.target - state.cond
    cosine = torch.cosine_similarity(added.float().flatten(1), wanted.float().flatten(1), dim=1)
    now, before = square_norm(student - state.target), square_norm(wanted)
    return torch.stack([now, before, cosine.where(before > 0, torch.nan)]).double()


def _sample(
    sampler: Sampler,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    shape: tuple[int, int, int],
    omegas: Sequence[float],
    config: AssessConfig,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Cost], dict[float, Estimate], list[dict[str, torch.Tensor]]]:
    """The cost of each method, the distance to the teacher's samples by omega, and latents to show, by method."""
    seconds, rows = ({method: [] for method in METHODS} for _ in range(2))
    apart, shown = {omega: [] for omega in omegas}, []
    total, done = len(METHODS) * _WARM_UP + config.count * config.steps * (1 + 2 * len(omegas)), 0

    def stepped() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    def run(method: str, image: int, omega: float, steps: int = config.steps) -> torch.Tensor:
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(config.seed + image))
        what = method, noise, positive[image], negative[image]
        start = time.perf_counter()
        latent, evaluations = sampler(*what, omega=omega, steps=steps, progress=stepped)
        seconds[method].append(time.perf_counter() - start)
        rows[method].append(evaluations)
        return latent

    for method in METHODS:  # the first time everything takes longer
        run(method, 0, omegas[0], _WARM_UP)
        seconds[method].clear()
        rows[method].clear()
    for image in range(config.count):
        unguided = run("unguided", image, omegas[0])
        for omega in omegas:
            guided, agd = run("guided", image, omega), run("agd", image, omega)
            apart[omega].append(torch.cat([square_norm(agd - guided), square_norm(unguided - guided)]).double())
            if omega == _middle(omegas) and image < _SHOWN:
                shown.append({"unguided": unguided, "guided": guided, "agd": agd})
    costs = {
        method: Cost(_mean(torch.tensor(seconds[method])), sum(rows[method]) / len(rows[method]) / config.steps)
        for method in METHODS
    }
    distances = {omega: _of_sums(torch.sqrt, *torch.stack(pairs, dim=1)) for omega, pairs in apart.items()}
    return costs, distances, shown


def _same_weights(host: Host, info: AdapterInfo) -> bool | None:
    """None for an adapter that was trained on none, or doesn't tell."""
    return info.base.fingerprint == host.base.fingerprint if info.base.fingerprint else None


def _reported(info: AdapterInfo, omegas: Sequence[float]) -> float | None:
    """The mean of what the training reports at these omegas; in between, linear in log omega."""
    then = sorted(_measured_then(info).items())
    if not then:
        return None
    return sum(_between(then, omega) for omega in omegas) / len(omegas)


def _between(points: Sequence[tuple[float, float]], omega: float) -> float:
    for (low, value), (high, next_value) in pairwise(points):
        if low <= omega <= high:
            share = math.log(omega / low) / math.log(high / low)
            return value + share * (next_value - value)
    return points[0][1] if omega < points[0][0] else points[-1][1]


def _notes(host: Host, info: AdapterInfo) -> list[str]:
    then, now = (patches.get("patched_weights", 0) for patches in (info.training.get("teacher", {}), host.teacher))
    if then == now:
        return []
    return [f"LoRAs and the like patch {now} weights of this model, but {then} of the one it was trained on."]


def _picture(
    host: Host, prompts: Sequence[str], shown: Sequence[dict[str, torch.Tensor]], teacher: str, omega: float
) -> Image.Image:
    rows = []
    for prompt, latents in zip(prompts, shown, strict=False):
        images = [host.picture(latents[method]) for method in METHODS]
        rows.append((prompt, [*images, ImageChops.subtract(images[2], images[1], offset=128)]))
    return contact_sheet(("unguided", f"{teacher} {omega:g}", f"AGD {omega:g}", f"AGD - {teacher} (grey: equal)"), rows)

"""The demo: distil a toy's guidance, then sample it through ComfyUI's KSampler unguided, with CFG and with AGD.

Writes adapter.safetensors, comparison.png, loss.png and report.json, and prints the table.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.atomic import write_text
from comfyui_agd.agd_core.comfyui.counting import RowCounter, counted
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.training.cli import ProgressBar
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.gap import Evaluation, evaluate
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Callbacks, Trained, train

from .bases import BASES, Base
from .gap import CaptionTrajectories, teacher_states
from .measure import omega_star
from .picture import comparison
from .sampling import (
    BATCH,
    SAMPLER,
    STEPS,
    Toy,
    captions_of,
    encode,
    held_out_captions,
    sample,
)
from .scenes import IMAGE_SIZE, Scene, draw_scenes, training_negatives
from .scoring import Scorer
from .standard_errors import mean_and_error, share_error
from .step_budget import StepBudget
from .tables import Column, console_table

PROMPTS, HELD_OUT = 2000, 32  # captions to train with, captions to measure the gap with
_PROMPTS_SEED, _GAP_SEED, _CAPTIONS_SEED, _NOISE_SEED = 3, 29, 31, 50_000
_SHOWN = 10
# All of it takes ten minutes on two CPU cores. On a slow or busy machine it does less, but never less than what closes
# two thirds of the gap and what figures can be measured with, however long that takes.
ITERATIONS, LEAST_ITERATIONS = 2400, 400
PICTURES, LEAST_PICTURES = 512, 256  # of each method and omega, in batches
_TRAINED_AFTER, _DONE_AFTER = 280, 510  # seconds since the start
_RECENT = 100  # iterations by which the time of the next ones is estimated
_DECAY_SHARE = 0.1  # of the iterations done, still to follow for the learning rate to decay
_LARGEST_ERROR = 0.1  # of the speed-up, over itself: with a larger one it is not reported
# What suits each base: the adapter, and how fast it may learn.
_SETTINGS: dict[str, dict] = {
    "toy": {"hidden": 28, "rank": 4, "encoder_width": 32, "learning_rate": 3e-3},
    "toy-dit": {
        "hidden": 32,
        "rank": 4,
        "vector": 64,
        "encoder_width": 32,
        "learning_rate": 3e-3,
        "schedulers": ("simple", "normal"),
        "solvers": ("euler", "dpmpp_2m"),
    },
}
_TITLES = {"unguided": "unguided", "cfg": "CFG", "cfg_half": f"CFG, {STEPS // 2} steps", "agd": "AGD"}


def training_config(iterations: int, omega_max: float, base: str = "toy") -> TrainConfig:
    return TrainConfig(
        iterations=iterations,
        batch=16,
        omega_max=omega_max,
        reuse=4,
        width=IMAGE_SIZE,
        height=IMAGE_SIZE,
        steps_min=15,
        steps_max=25,
        precision="bf16",
        held_out=0,  # measured below, on captions of scenes that no training saw
        preview_every=0,
        **_SETTINGS[base],
    )


def training_budget(begun: float, iterations: int | None, clock: Callable[[], float] = time.monotonic) -> StepBudget:
    """`iterations`: as many, whatever the clock says. `begun`: the moment the demo began."""
    least, most = (iterations, iterations) if iterations else (LEAST_ITERATIONS, ITERATIONS)
    return StepBudget(least, most, begun + _TRAINED_AFTER, recent=_RECENT, decay_share=_DECAY_SHARE, clock=clock)


def sampling_budget(begun: float, pictures: int | None, clock: Callable[[], float] = time.monotonic) -> StepBudget:
    """In rounds of `BATCH` pictures by each method."""
    least, most = (pictures, pictures) if pictures else (LEAST_PICTURES, PICTURES)
    return StepBudget(math.ceil(least / BATCH), math.ceil(most / BATCH), begun + _DONE_AFTER, clock=clock)


def distil(
    parts: Toy, config: TrainConfig, omegas: list[float], budget: StepBudget
) -> tuple[Trained, Evaluation, float]:
    """The adapter, its gap on held-out captions, and the seconds of the training alone."""
    prompts = captions_of(draw_scenes(PROMPTS, _PROMPTS_SEED, held=False))
    model = ComfyModel(parts.model, parts.clip, autocast=config.autocast)
    bar, start = ProgressBar(), time.monotonic()
    callbacks = Callbacks(bar, iterations=lambda done, planned: budget.steps(done))
    try:
        trained = train(model, prompts, config, callbacks, RunOptions(negative=training_negatives()))
    finally:
        bar.close()
    seconds = time.monotonic() - start
    exact = ComfyModel(parts.model, parts.clip)  # measured in the base's own precision
    captions = held_out_captions(HELD_OUT, _GAP_SEED)[1]
    states = teacher_states(exact, CaptionTrajectories(captions, omegas, scheduler=parts.base.scheduler))
    with exact.denoiser.session():
        gap = evaluate(exact.denoiser, trained.adapter, states)
    return trained, gap, seconds


@dataclass(frozen=True)
class MethodResult:
    """What is measured of a method at one omega. None: of too few pictures."""

    method: str
    omega: float
    steps: int
    seconds_per_image: float
    evaluations_per_step: float
    prompt_accuracy: float | None
    prompt_accuracy_se: float | None
    frechet_to_real: float | None


@dataclass
class MethodSamples:
    """What a method draws at one omega: the pictures of each round (n, 3, 64, 64), and what they took."""

    method: str
    omega: float
    model: object
    counter: RowCounter
    rounds: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # inside KSampler, per round
    evaluations: int = 0
    steps: int = STEPS

    @property
    def images(self) -> torch.Tensor:
        return torch.cat(self.rounds)

    @property
    def title(self) -> str:
        name = _TITLES[self.method]
        return name if self.omega == 1 else f"{name}, cfg {self.omega:g}"

    def draw(self, parts: Toy, prompts: list, seed: int) -> None:
        self.counter.clear()
        pictures = sample(parts, self.model, prompts, parts.settings(self.omega, seed, self.steps))
        self.rounds.append(pictures.images)
        self.seconds.append(sum(pictures.seconds))
        self.evaluations += self.counter.total

    def measure(self, scorer: Scorer, scenes: list[Scene]) -> MethodResult:
        """Accuracy and Fréchet distance only of enough pictures."""
        images, scored = self.images, enough(len(self.images))
        accuracy = scorer.accuracy(images, scenes) if scored else None
        return MethodResult(
            self.method,
            self.omega,
            self.steps,
            seconds_per_image=sum(self.seconds) / len(images),
            evaluations_per_step=self.evaluations / (len(images) * self.steps),
            prompt_accuracy=accuracy,
            prompt_accuracy_se=share_error(accuracy, len(images)) if scored else None,
            frechet_to_real=scorer.frechet(images) if scored else None,
        )


def enough(pictures: int) -> bool:
    return pictures >= LEAST_PICTURES


class Speedup(NamedTuple):
    """How many times as fast as CFG AGD is, and its standard error; None of too few pictures or a busy machine."""

    factor: float | None = None
    error: float | None = None


def speedup(samples: list[MethodSamples]) -> Speedup:
    """Over rounds, in each of which both methods ran."""

    def spent(method: str) -> list[float]:
        return [sum(times) for times in zip(*(c.seconds for c in samples if c.method == method), strict=True)]

    cfg, agd = spent("cfg"), spent("agd")
    if not enough(len(samples[0].images)) or len(cfg) < 2:
        return Speedup()
    _, error = mean_and_error(torch.tensor(cfg, dtype=torch.float64) / torch.tensor(agd, dtype=torch.float64))
    found = sum(cfg) / sum(agd)
    return Speedup(found, error) if error <= _LARGEST_ERROR * found else Speedup()


def warm_up(parts: Toy, models: list, omega: float) -> None:
    """The first pictures of a process pay for loading; no method should."""
    for model in models:
        sample(parts, model, encode(parts.clip, held_out_captions(4, 0)[1]), parts.settings(omega, 0, steps=2))


def rounds_of(budget: StepBudget) -> Iterator[int]:
    """0, 1, 2, ..., as many as the budget has."""
    done = 0
    with tqdm(desc="pictures", total=budget.most, unit="round") as bar:
        while done < budget.steps(done):
            yield done
            done += 1
            bar.update()


def draw_all(
    parts: Toy, adapter: Path, omegas: list[float], captions: list[str], budget: StepBudget
) -> list[MethodSamples]:
    """Every method at every omega, as a user would: the adapter from its file, pictures from ComfyUI's KSampler.

    At the best omega CFG has half of the steps too, which are as many evaluations as AGD's.
    """
    base, base_rows = counted(parts.model)
    agd, agd_rows = counted(apply_adapter(parts.model, *adapter_file.load_weights(adapter), source=str(adapter)))
    prompts = encode(parts.clip, captions)
    warm_up(parts, [base, agd], omegas[0])
    samples = [MethodSamples("unguided", 1.0, base, base_rows)]
    for omega in omegas:
        samples += [MethodSamples("cfg", omega, base, base_rows), MethodSamples("agd", omega, agd, agd_rows)]
        if omega == omega_star(parts.base.name):
            samples.append(MethodSamples("cfg_half", omega, base, base_rows, steps=STEPS // 2))
    # All methods in every round: their pictures are as many, and what else the machine does slows them all alike.
    for i in rounds_of(budget):
        for each in samples:
            each.draw(parts, prompts[i : i + 1], seed=_NOISE_SEED + i)
    return samples


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(BASES), default="toy", help="the base to distil")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    shown = f"of training; default: {ITERATIONS}, or what fits into time, {LEAST_ITERATIONS} or more"
    parser.add_argument("--iterations", type=int, help=shown)
    shown = f"pictures per method and omega; default: {PICTURES}, or what fits into time, {LEAST_PICTURES} or more"
    parser.add_argument("--captions", type=int, help=shown)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args, begun = parse(argv), time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    parts, best = Toy.load(args.model), omega_star(args.model)
    omegas = [(1 + best) / 2, best, 2 * best - 1]
    what = f"the guidance of {parts.base.title} (omega* = {best:g})"
    print(f"Distilling {what} from {PROMPTS} captions, no pictures.", flush=True)
    budget = training_budget(begun, args.iterations)
    trained, gap, seconds = distil(parts, training_config(budget.most, 2 * best, args.model), omegas, budget)
    done = trained.info.training["iterations"]
    if done < budget.most:
        print(f"The machine is slow or busy: {done} iterations of {budget.most}.", flush=True)
    file = adapter_file.save(args.out / "adapter.safetensors", trained.adapter, trained.info)
    trained.plot().save(args.out / "loss.png")

    scenes, captions = held_out_captions(args.captions or PICTURES, _CAPTIONS_SEED)
    samples, scorer = draw_all(parts, file, omegas, captions, sampling_budget(begun, args.captions)), Scorer()
    results = [each.measure(scorer, scenes[: len(each.images)]) for each in samples]
    report = make_report(parts.base, trained, gap, results, speedup(samples))
    parameters = sum(p.numel() for p in parts.model.model.diffusion_model.parameters())
    report["adapter"]["percent_of_base"] = round(100 * report["adapter"]["parameters"] / parameters, 2)
    report |= {"pictures": len(samples[0].images), "training_seconds": round(seconds, 1)}
    write(args.out, report, samples, parts.base)
    print_table(results, gap, report)
    print(f"Wrote adapter.safetensors, comparison.png, loss.png and report.json to {args.out}/.")


def write(folder: Path, report: dict, samples: list[MethodSamples], base: Base) -> None:
    """report.json and comparison.png."""
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    title = f"{base.name}, {STEPS} steps of {SAMPLER}: CFG evaluates the model twice per step, AGD once"
    comparison([(each.title, each.images[:_SHOWN]) for each in samples], title).save(folder / "comparison.png")


def make_report(base: Base, trained: Trained, gap: Evaluation, results: list[MethodResult], faster: Speedup) -> dict:
    """What report.json holds; what is given per omega has the omega as its key. None: of too few pictures."""
    methods = ("cfg", "agd", "unguided", "cfg_half")

    def rounded(value: float | None, digits: int = 4) -> float | None:
        return None if value is None else round(value, digits)

    def mean(method: str, key: str) -> float:
        return statistics.mean(getattr(each, key) for each in results if each.method == method)

    def by_omega(key: str) -> dict:
        found: dict[str, dict] = {method: {} for method in methods}
        for result in results:
            found[result.method][f"{result.omega:g}"] = rounded(getattr(result, key))
        return found | {"unguided": found["unguided"]["1"]}

    return {
        "base": trained.info.base.describe(),
        "omega_star": omega_star(base.name),
        "adapter": {"parameters": trained.adapter.parameter_count()},
        "evaluations_per_step": {m: round(mean(m, "evaluations_per_step"), 4) for m in ("cfg", "agd")},
        "seconds_per_image": {m: round(mean(m, "seconds_per_image"), 5) for m in methods},
        "speedup": rounded(faster.factor, 3),
        "speedup_se": rounded(faster.error, 3),
        **gap.summary(),
        "frechet_to_real": by_omega("frechet_to_real"),
        "prompt_accuracy": by_omega("prompt_accuracy"),
        "prompt_accuracy_se": by_omega("prompt_accuracy_se"),
        "teacher_evaluations": trained.info.training["teacher_evaluations"],
        "sampling": {"sampler": SAMPLER, "scheduler": base.scheduler, "steps": STEPS, "steps_of_cfg_half": STEPS // 2},
    }


def table_columns(gap: Evaluation, pictured: bool) -> tuple[Column[MethodResult], ...]:
    """`pictured`: whether the pictures are enough for what is read from them."""

    def of_pictures(text: Callable[[MethodResult], str]) -> Callable[[MethodResult], str]:
        return text if pictured else lambda result: "-"

    def of_gap(by_omega: dict[float, float]) -> Callable[[MethodResult], str]:
        return lambda result: f"{by_omega[result.omega]:.3f}" if result.method == "agd" else ""

    def accuracy(result: MethodResult) -> str:
        return f"{result.prompt_accuracy:.3f} ({result.prompt_accuracy_se:.3f})"

    return (
        Column("method", lambda result: result.method, -10),
        Column("omega", lambda result: f"{result.omega:g}", 7),
        Column("steps", lambda result: str(result.steps), 7),
        Column("evals/step", lambda result: f"{result.evaluations_per_step:.2f}", 13),
        Column("s/image", of_pictures(lambda result: f"{result.seconds_per_image:.4f}"), 11),
        Column("accuracy (SE)", of_pictures(accuracy), 16),
        Column("Fréchet", of_pictures(lambda result: f"{result.frechet_to_real:.2f}"), 10),
        Column("gap closed", of_gap(gap.gap_closed), 12),
        Column("cosine", of_gap(gap.direction_cosine), 9),
    )


def print_table(results: list[MethodResult], gap: Evaluation, report: dict) -> None:
    pictured = enough(report["pictures"])
    print(*console_table(table_columns(gap, pictured), results), sep="\n")
    adapter = report["adapter"]
    print(
        f"{report['pictures']} pictures per line; Fréchet distances of so few compare within this table only.\n"
        f"Adapter: {adapter['parameters']:,} parameters ({adapter['percent_of_base']} % of the base), trained in "
        f"{report['training_seconds']:.0f} s with {report['teacher_evaluations']:,} teacher evaluations."
    )
    if report["speedup"] is not None:
        print(f"AGD is {report['speedup']:.2f} ({report['speedup_se']:.2f}) times as fast as CFG.")
    elif pictured:
        print("How much faster than CFG AGD is can't be told: the machine was too busy.")
    else:
        print(f"AGD is compared with CFG from {LEAST_PICTURES} pictures on: fewer tell too little.")

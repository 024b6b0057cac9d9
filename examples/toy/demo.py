"""The demo: distil the toy's guidance, then sample it through ComfyUI's KSampler unguided, with CFG and with AGD.

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

import torch
from tqdm import tqdm

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.comfyui.counting import RowCounter, counted
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.sampling.guided_sampling import apply_adapter
from comfyui_agd.training.cli import ProgressBar
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.evaluate import Evaluation, Trajectories, evaluate, follow_teacher
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Callbacks, Trained, train

from .measure import omega_star
from .pace import Pace
from .picture import contact_sheet
from .sampling import BATCH, SAMPLER, SCHEDULER, STEPS, Jury, Toy, captions_of, encode, held_out_captions, sample
from .scenes import IMAGE_SIZE, Scene, draw_scenes, training_negatives

PROMPTS, HELD_OUT = 2000, 32  # captions to train with, captions to measure the gap with
_PROMPTS_SEED, _GAP_SEED, _CAPTIONS_SEED, _NOISE_SEED = 3, 29, 31, 50_000
_SHOWN = 10
# All of it takes ten minutes on two CPU cores. On a slow or busy machine it does less, but never less than what closes
# two thirds of the gap and what figures can be told from, however long that takes.
ITERATIONS, LEAST_ITERATIONS = 2400, 400
PICTURES, LEAST_PICTURES = 512, 256  # of each method and omega, in batches
_TRAINED_AFTER, _DONE_AFTER = 280, 510  # seconds since the start
_RECENT, _LANDING = 100, 0.1  # iterations that the pace of training is told by; share left for its rate to fall
_LARGEST_ERROR = 0.1  # of the speed-up, over itself: with a larger one it is not told


def training_config(iterations: int, omega_max: float) -> TrainConfig:
    return TrainConfig(
        iterations=iterations,
        batch=16,
        learning_rate=3e-3,
        omega_max=omega_max,
        reuse=4,
        width=IMAGE_SIZE,
        height=IMAGE_SIZE,
        hidden=28,
        encoder_width=32,
        steps_min=15,
        steps_max=25,
        precision="bf16",
        held_out=0,  # measured below, on captions of scenes that no training saw
        preview_every=0,
    )


def training_pace(begun: float, iterations: int | None, clock: Callable[[], float] = time.monotonic) -> Pace:
    """`iterations`: as many, whatever the clock says. `begun`: the moment the demo began."""
    least, most = (iterations, iterations) if iterations else (LEAST_ITERATIONS, ITERATIONS)
    return Pace(least, most, begun + _TRAINED_AFTER, recent=_RECENT, landing=_LANDING, clock=clock)


def sampling_pace(begun: float, pictures: int | None, clock: Callable[[], float] = time.monotonic) -> Pace:
    """In rounds of `BATCH` pictures by each method."""
    least, most = (pictures, pictures) if pictures else (LEAST_PICTURES, PICTURES)
    return Pace(math.ceil(least / BATCH), math.ceil(most / BATCH), begun + _DONE_AFTER, clock=clock)


def distil(parts: Toy, config: TrainConfig, omegas: list[float], pace: Pace) -> tuple[Trained, Evaluation, float]:
    """The adapter, its gap on held-out captions, and the seconds of the training alone."""
    prompts = captions_of(draw_scenes(PROMPTS, _PROMPTS_SEED, held=False))
    model = ComfyModel(parts.model, parts.clip, autocast=config.autocast)
    bar, start = ProgressBar(), time.monotonic()
    callbacks = Callbacks(bar, iterations=lambda done, planned: pace.steps(done))
    try:
        trained = train(model, prompts, config, callbacks, RunOptions(negative=training_negatives()))
    finally:
        bar.close()
    seconds = time.monotonic() - start
    exact = ComfyModel(parts.model, parts.clip)  # measured in the base's own precision
    denoiser, encode = exact.denoiser, exact.text_encoder.encode
    positive = encode(held_out_captions(HELD_OUT, _GAP_SEED)[1])
    negative = encode([""], "negative") * HELD_OUT
    trajectories = Trajectories(denoiser.latent_shape(config.width, config.height), omegas, steps=STEPS)
    with denoiser.session():
        states = follow_teacher(denoiser, positive, negative, trajectories, batch=HELD_OUT)
        gap = evaluate(denoiser, trained.adapter, states)
    return trained, gap, seconds


@dataclass
class Column:
    """What a method draws at one omega: the pictures of each round (n, 3, 64, 64), and what they took."""

    method: str
    omega: float
    model: object
    counter: RowCounter
    rounds: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # inside KSampler, per round
    evaluations: int = 0

    @property
    def images(self) -> torch.Tensor:
        return torch.cat(self.rounds)

    @property
    def title(self) -> str:
        name = {"unguided": "unguided", "cfg": "CFG", "agd": "AGD"}[self.method]
        return name if self.omega == 1 else f"{name}, cfg {self.omega:g}"

    def draw(self, parts: Toy, prompts: list, seed: int) -> None:
        self.counter.clear()
        images, seconds = sample(parts, self.model, prompts, cfg=self.omega, seed=seed)
        self.rounds.append(images)
        self.seconds.append(seconds)
        self.evaluations += self.counter.total

    def measure(self, jury: Jury, scenes: list[Scene]) -> dict:
        """Accuracy and Fréchet distance only of as many pictures as tell something."""
        images, told = self.images, enough(len(self.images))
        accuracy = jury.accuracy(images, scenes) if told else None
        return {
            "seconds_per_image": sum(self.seconds) / len(images),
            "evaluations_per_step": self.evaluations / (len(images) * STEPS),
            "prompt_accuracy": accuracy,
            "prompt_accuracy_se": share_error(accuracy, len(images)) if told else None,
            "frechet_to_real": jury.frechet(images) if told else None,
        }


def enough(pictures: int) -> bool:
    return pictures >= LEAST_PICTURES


def share_error(share: float, count: int) -> float:
    """The standard error of a share of `count` (Agresti and Coull 1998): not 0 where all or none of them were seen."""
    adjusted = (share * count + 2) / (count + 4)
    return math.sqrt(adjusted * (1 - adjusted) / (count + 4))


def speedup(columns: list[Column]) -> tuple[float | None, float | None]:
    """How many times as fast as CFG AGD is, and its standard error over rounds, in which both ran side by side.

    None where the pictures are too few, or the machine was too busy, to tell.
    """

    def spent(method: str) -> list[float]:
        return [sum(times) for times in zip(*(c.seconds for c in columns if c.method == method), strict=True)]

    cfg, agd = spent("cfg"), spent("agd")
    if not enough(len(columns[0].images)) or len(cfg) < 2:
        return None, None
    error = statistics.stdev(a / b for a, b in zip(cfg, agd, strict=True)) / math.sqrt(len(cfg))
    found = sum(cfg) / sum(agd)
    return (found, error) if error <= _LARGEST_ERROR * found else (None, None)


def warm_up(parts: Toy, models: list, omega: float) -> None:
    """The first pictures of a process pay for loading; no method should."""
    for model in models:
        sample(parts, model, encode(parts.clip, held_out_captions(4, 0)[1]), cfg=omega, seed=0, steps=2)


def rounds_of(pace: Pace) -> Iterator[int]:
    """0, 1, 2, ..., as long as the pace lets them."""
    done = 0
    with tqdm(desc="pictures", total=pace.most, unit="round") as bar:
        while done < pace.steps(done):
            yield done
            done += 1
            bar.update()


def draw_all(parts: Toy, adapter: Path, omegas: list[float], captions: list[str], pace: Pace) -> list[Column]:
    """Every method at every omega, as a user would: the adapter from its file, pictures from ComfyUI's KSampler."""
    base, base_rows = counted(parts.model)
    agd, agd_rows = counted(apply_adapter(parts.model, *adapter_file.load_state(adapter), source=str(adapter)))
    prompts = encode(parts.clip, captions)
    warm_up(parts, [base, agd], omegas[0])
    columns = [Column("unguided", 1.0, base, base_rows)]
    for omega in omegas:
        columns += [Column("cfg", omega, base, base_rows), Column("agd", omega, agd, agd_rows)]
    # All methods in every round: their pictures are as many, and what else the machine does slows them all alike.
    for i in rounds_of(pace):
        for column in columns:
            column.draw(parts, prompts[i : i + 1], seed=_NOISE_SEED + i)
    return columns


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    shown = f"of training; default: {ITERATIONS}, or what fits into time, {LEAST_ITERATIONS} or more"
    parser.add_argument("--iterations", type=int, help=shown)
    shown = f"pictures per method and omega; default: {PICTURES}, or what fits into time, {LEAST_PICTURES} or more"
    parser.add_argument("--captions", type=int, help=shown)
    args = parser.parse_args(argv)
    begun = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    parts, best = Toy.load(), omega_star()
    omegas = [(1 + best) / 2, best, 2 * best - 1]
    print(f"Distilling the toy's guidance (omega* = {best:g}) from {PROMPTS} captions, no pictures.", flush=True)
    pace = training_pace(begun, args.iterations)
    trained, gap, seconds = distil(parts, training_config(pace.most, 2 * best), omegas, pace)
    done = trained.info.training["iterations"]
    if done < pace.most:
        print(f"The machine is slow or busy: {done} iterations of {pace.most}.", flush=True)
    file = adapter_file.save(args.out / "adapter.safetensors", trained.adapter, trained.info)
    trained.plot().save(args.out / "loss.png")

    scenes, captions = held_out_captions(args.captions or PICTURES, _CAPTIONS_SEED)
    columns, jury = draw_all(parts, file, omegas, captions, sampling_pace(begun, args.captions)), Jury()
    results = {(c.method, c.omega): c.measure(jury, scenes[: len(c.images)]) for c in columns}
    report = make_report(trained, gap, results, speedup(columns))
    parameters = sum(p.numel() for p in parts.model.model.diffusion_model.parameters())
    report["adapter"]["percent_of_base"] = round(100 * report["adapter"]["parameters"] / parameters, 2)
    report |= {"pictures": len(columns[0].images), "training_seconds": round(seconds, 1)}
    with adapter_file.replacing(args.out / "report.json") as temporary:
        Path(temporary).write_text(json.dumps(report, indent=2) + "\n")
    title = f"The toy, {STEPS} steps of {SAMPLER}: CFG evaluates the model twice per step, AGD once"
    contact_sheet([(c.title, c.images[:_SHOWN]) for c in columns], title).save(args.out / "comparison.png")
    print_table(results, gap, report)
    print(f"Wrote adapter.safetensors, comparison.png, loss.png and report.json to {args.out}/.")


def make_report(trained: Trained, gap: Evaluation, results: dict, times: tuple[float | None, float | None]) -> dict:
    """DESIGN's keys; what is given per omega has the omega as its key. None: too few pictures to tell."""
    methods = ("cfg", "agd", "unguided")

    def rounded(value: float | None, digits: int = 4) -> float | None:
        return None if value is None else round(value, digits)

    def mean(method: str, key: str) -> float:
        return statistics.mean(value[key] for (name, _), value in results.items() if name == method)

    def each(key: str) -> dict:
        found = {m: {f"{o:g}": rounded(v[key]) for (name, o), v in results.items() if name == m} for m in methods}
        return {"unguided": found["unguided"]["1"], "cfg": found["cfg"], "agd": found["agd"]}

    return {
        "base": trained.info.base.describe(),
        "omega_star": omega_star(),
        "adapter": {"parameters": trained.adapter.parameter_count()},
        "evaluations_per_step": {m: round(mean(m, "evaluations_per_step"), 4) for m in ("cfg", "agd")},
        "seconds_per_image": {m: round(mean(m, "seconds_per_image"), 5) for m in methods},
        "speedup": rounded(times[0], 3),
        "speedup_se": rounded(times[1], 3),
        **gap.summary(),
        "frechet_to_real": each("frechet_to_real"),
        "prompt_accuracy": each("prompt_accuracy"),
        "prompt_accuracy_se": each("prompt_accuracy_se"),
        "teacher_evaluations": trained.info.training["teacher_evaluations"],
        "sampling": {"sampler": SAMPLER, "scheduler": SCHEDULER, "steps": STEPS},
    }


def print_table(results: dict, gap: Evaluation, report: dict) -> None:
    told = enough(report["pictures"])
    line = "{:<10}{:>7}{:>13}{:>11}{:>16}{:>10}{:>12}{:>9}"
    print(line.format("method", "omega", "evals/step", "s/image", "accuracy (SE)", "Fréchet", "gap closed", "cosine"))
    for (method, omega), values in results.items():
        closed = (f"{gap.gap_closed[omega]:.3f}", f"{gap.direction_cosine[omega]:.3f}") if method == "agd" else ("", "")
        pictured = ("-", "-", "-")
        if told:
            accuracy = f"{values['prompt_accuracy']:.3f} ({values['prompt_accuracy_se']:.3f})"
            pictured = f"{values['seconds_per_image']:.4f}", accuracy, f"{values['frechet_to_real']:.2f}"
        print(line.format(method, f"{omega:g}", f"{values['evaluations_per_step']:.2f}", *pictured, *closed))
    adapter = report["adapter"]
    print(
        f"{report['pictures']} pictures per line; Fréchet distances of so few compare within this table only.\n"
        f"Adapter: {adapter['parameters']:,} parameters ({adapter['percent_of_base']} % of the base), trained in "
        f"{report['training_seconds']:.0f} s with {report['teacher_evaluations']:,} teacher evaluations."
    )
    if report["speedup"] is not None:
        print(f"AGD is {report['speedup']:.2f} ({report['speedup_se']:.2f}) times as fast as CFG.")
    elif told:
        print("How much faster than CFG AGD is can't be told: the machine was too busy.")
    else:
        print(f"AGD is compared with CFG from {LEAST_PICTURES} pictures on: fewer tell too little.")

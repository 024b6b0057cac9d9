"""The demo: distil the toy's guidance, then sample it through ComfyUI's KSampler unguided, with CFG and with AGD.

Writes adapter.safetensors, comparison.png, loss.png and report.json, and prints the table.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from tqdm import tqdm

from comfyui_agd.agd_core import checkpoint
from comfyui_agd.agd_core.comfyui.counting import counted
from comfyui_agd.agd_core.comfyui.embedded import apply_adapter
from comfyui_agd.agd_core.comfyui.host import ComfyHost
from comfyui_agd.training.cli import ProgressBar
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.evaluate import Evaluation, evaluate, follow_teacher
from comfyui_agd.training.trainer import Callbacks, Trained, train

from .measure import omega_star
from .picture import contact_sheet
from .sampling import SAMPLER, SCHEDULER, STEPS, Jury, Toy, captions_of, encode, held_out_captions, sample
from .scenes import IMAGE_SIZE, draw_scenes, training_negatives

PROMPTS, HELD_OUT = 2000, 32  # captions to train with, captions to measure the gap with
_PROMPTS_SEED, _GAP_SEED, _CAPTIONS_SEED, _NOISE_SEED = 3, 29, 31, 50_000
_SHOWN = 10
ITERATIONS, CAPTIONS = 2400, 512
# The demo ends within ten minutes on two CPU cores; all of it takes as long as this many iterations of its training.
_SECONDS, _ALL_IN_ITERATIONS = 510, 4400


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


def distil(parts: Toy, config: TrainConfig, omegas: list[float]) -> tuple[Trained, Evaluation, float]:
    """The adapter, its gap on held-out captions, and the seconds of the training alone."""
    prompts = captions_of(draw_scenes(PROMPTS, _PROMPTS_SEED, held=False))
    host = ComfyHost(parts.model, parts.clip, autocast=config.autocast)
    bar, start = ProgressBar(), time.monotonic()
    try:
        trained = train(host, prompts, config, Callbacks(bar), negative=training_negatives())
    finally:
        bar.close()
    seconds = time.monotonic() - start
    exact = ComfyHost(parts.model, parts.clip)  # measured in the base's own precision
    shape = exact.latent_shape(config.width, config.height)
    positive = exact.encode(held_out_captions(HELD_OUT, _GAP_SEED)[1])
    negative = exact.encode([""], "negative") * HELD_OUT
    with exact.session():
        states = follow_teacher(exact, positive, negative, shape, omegas, steps=STEPS, batch=HELD_OUT)
        gap = evaluate(exact, trained.adapter, states)
    return trained, gap, seconds


def share_that_fits(parts: Toy) -> float:
    """How much of the demo, at most all of it, this machine does in time; told by a few iterations of a trial."""
    config, moments = dataclasses.replace(training_config(12, 6.0), pool=1), []
    host = ComfyHost(parts.model, parts.clip, autocast=config.autocast)
    captions = captions_of(draw_scenes(16, 0, held=False))
    train(host, captions, config, Callbacks(lambda progress: moments.append(time.monotonic())))
    per_iteration = (moments[-1] - moments[-9]) / 8  # twice as many as `reuse`: two of them ask the teacher
    return min(1.0, _SECONDS / (_ALL_IN_ITERATIONS * per_iteration))


def warm_up(parts: Toy, models: list, omega: float) -> None:
    """The first pictures of a process pay for loading; no method should."""
    for model in models:
        sample(parts, model, encode(parts.clip, held_out_captions(4, 0)[1]), cfg=omega, seed=0, steps=2)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    parser.add_argument("--iterations", type=int, help=f"of training; default: {ITERATIONS}, or what fits into time")
    parser.add_argument("--captions", type=int, help=f"pictures per method and omega; default: {CAPTIONS}, likewise")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    parts, best = Toy.load(), omega_star()
    omegas = [(1 + best) / 2, best, 2 * best - 1]
    print(f"Distilling the toy's guidance (omega* = {best:g}) from {PROMPTS} captions, no pictures.", flush=True)
    share = 1.0 if args.iterations and args.captions else share_that_fits(parts)
    if share < 1:
        print(f"This machine is slow: {share:.0%} of the training and of the pictures, to be done in time.", flush=True)
    iterations, captions = args.iterations or round(share * ITERATIONS), args.captions or round(share * CAPTIONS)
    trained, gap, seconds = distil(parts, training_config(iterations, 2 * best), omegas)
    file = checkpoint.save(args.out / "adapter.safetensors", trained.adapter, trained.info)
    trained.plot().save(args.out / "loss.png")

    # From here on as a user would: the adapter comes from its file, pictures from ComfyUI's KSampler.
    base, base_rows = counted(parts.model)
    agd, agd_rows = counted(apply_adapter(parts.model, *checkpoint.load_state(file), source=str(file)))
    scenes, captions = held_out_captions(captions, _CAPTIONS_SEED)
    prompts, jury, results, rows = encode(parts.clip, captions), Jury(), {}, []
    warm_up(parts, [base, agd], best)
    settings = [("unguided", base, base_rows, 1.0)]
    for omega in omegas:
        settings += [("cfg", base, base_rows, omega), ("agd", agd, agd_rows, omega)]
    for method, model, counter, omega in tqdm(settings, desc="methods"):
        counter.clear()
        images, spent = sample(parts, model, prompts, cfg=omega, seed=_NOISE_SEED)
        results[method, omega] = {
            "seconds_per_image": spent / len(images),
            "evaluations_per_step": counter.total / (len(images) * STEPS),
            "prompt_accuracy": jury.accuracy(images, scenes),
            "frechet_to_real": jury.frechet(images),
        }
        name = {"unguided": "unguided", "cfg": "CFG", "agd": "AGD"}[method]
        rows.append((name if omega == 1 else f"{name}, cfg {omega:g}", images[:_SHOWN]))

    report = make_report(parts, trained, gap, seconds, best, omegas, results)
    with checkpoint.replacing(args.out / "report.json") as temporary:
        Path(temporary).write_text(json.dumps(report, indent=2) + "\n")
    title = f"The toy, {STEPS} steps of {SAMPLER}: CFG evaluates the model twice per step, AGD once"
    contact_sheet(rows, title).save(args.out / "comparison.png")
    print_table(results, gap, report)
    print(f"Wrote adapter.safetensors, comparison.png, loss.png and report.json to {args.out}/.")


def make_report(
    parts: Toy, trained: Trained, gap: Evaluation, seconds: float, best: float, omegas: list[float], results: dict
) -> dict:
    """DESIGN's keys; what is given per omega has the omega as its key."""
    parameters = trained.adapter.parameter_count()
    base_parameters = sum(p.numel() for p in parts.model.model.diffusion_model.parameters())

    def mean(method: str, key: str) -> float:
        values = [value[key] for (name, _), value in results.items() if name == method]
        return sum(values) / len(values)

    def each(key: str) -> dict:
        per_omega = {m: {f"{o:g}": round(results[m, o][key], 4) for o in omegas} for m in ("cfg", "agd")}
        return {"unguided": round(results["unguided", 1.0][key], 4)} | per_omega

    methods = ("cfg", "agd", "unguided")
    return {
        "base": trained.info.base.describe(),
        "omega_star": best,
        "adapter": {"parameters": parameters, "percent_of_base": round(100 * parameters / base_parameters, 2)},
        "evaluations_per_step": {m: round(mean(m, "evaluations_per_step"), 4) for m in ("cfg", "agd")},
        "seconds_per_image": {m: round(mean(m, "seconds_per_image"), 5) for m in methods},
        "speedup": round(mean("cfg", "seconds_per_image") / mean("agd", "seconds_per_image"), 3),
        **gap.summary(),
        "frechet_to_real": each("frechet_to_real"),
        "prompt_accuracy": each("prompt_accuracy"),
        "teacher_evaluations": trained.info.training["teacher_evaluations"],
        "training_seconds": round(seconds, 1),
        "sampling": {"sampler": SAMPLER, "scheduler": SCHEDULER, "steps": STEPS},
    }


def print_table(results: dict, gap: Evaluation, report: dict) -> None:
    line = "{:<10}{:>7}{:>13}{:>11}{:>11}{:>10}{:>12}{:>9}"
    print(line.format("method", "omega", "evals/step", "s/image", "accuracy", "Fréchet", "gap closed", "cosine"))
    for (method, omega), values in results.items():
        closed = (f"{gap.gap_closed[omega]:.3f}", f"{gap.direction_cosine[omega]:.3f}") if method == "agd" else ("", "")
        numbers = [f"{values[k]:.{d}f}" for k, d in zip(values, (4, 2, 3, 2), strict=True)]
        print(line.format(method, f"{omega:g}", numbers[1], numbers[0], *numbers[2:], *closed))
    adapter = report["adapter"]
    print(
        f"Adapter: {adapter['parameters']:,} parameters ({adapter['percent_of_base']} % of the base), trained in "
        f"{report['training_seconds']:.0f} s with {report['teacher_evaluations']:,} teacher evaluations. "
        f"AGD is {report['speedup']:.2f} times as fast as CFG."
    )

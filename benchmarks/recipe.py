"""What a training recipe costs: gap closed on held-out captions against the teacher's evaluations, on the toys.

    python benchmarks/recipe.py [--base toy-dit] [--quick] [--only VARIANT ...] [--work DIR] [--json FILE]
                                [--device cuda]

Two recipes on the same base, with the same held-out captions and measurements:

- `paper`: that of the paper's authors (`authors_recipe.py`), with their own adapter. There, 500 captions are 1.0 M
  teacher evaluations; 5000 steps of batch 64 see 64 % of the states. Here everything is an eighth: 64 captions, 128 k
  evaluations, 2560 steps of batch 16. Their learning rate, 1e-4, is a large model's; it is also tuned.
- `ours`: a tenth of those evaluations, along live trajectories of a new caption each, with the default adapter and with
  theirs.

What was trained is kept in the work folder: the command goes on where it was stopped, and writes recipe.md, .json and
.png (of the toy transformer recipe-toy-dit.md and so on) with all rows that are there.
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
from dataclasses import dataclass, field

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import (
    TOYS,
    add_results,
    add_work,
    benchmark_parser,
    named_for,
    selected,
    work_path,
)
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import publish, results_folder
from comfyui_agd.examples.toy.tables import Column, markdown_table
from comfyui_agd.training.plot import Diagram

CAPTIONS, SEEN, HELD_OUT, MEASUREMENTS = 64, 0.64, 32, 8
# Theirs, and those that are tried, with so large a part of the steps.
THEIR_RATE, RATES, TRIED = 1e-4, (1e-3, 2e-3, 4e-3), 1 / 4
_QUICK = 1 / 32  # of the size
_COLOURS = ("#888888", "#222222", "#a08000", "#b0306a", "#2f8f4e", "#1f5fbf", "#c2571a", "#7a3fb0")


@dataclass(frozen=True)
class Variant:
    """`recipe`: "paper" or "ours"; `adapter`: "default", or a kind of the authors'. `rates`: the learning rates that
    are tried by the paper's recipe; `settings`: the trainer's, of ours."""

    recipe: str
    adapter: str
    name: str
    rates: tuple[float, ...] = ()
    settings: dict = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        return f"{self.recipe}, {self.adapter}, {self.name}"

    @property
    def stem(self) -> str:
        """Of its files."""
        return "-".join(self.full_name.replace(",", "").split())


def variants(layout: str) -> list[Variant]:
    """Those that a base of that layout has a place for, in the order of the table."""
    from comfyui_agd.benchmarks.methods import AUTHORS

    theirs, tuned = "paper_attention", "learning rate tuned"
    often = {"reuse": 4, "reuse_from": 256}
    found = [
        Variant("paper", theirs, "learning rate 1e-4, theirs", (THEIR_RATE,)),
        Variant("paper", theirs, tuned, RATES),
        Variant("paper", "default", tuned, RATES),
        Variant("ours", theirs, "each state 4 times, their loss", settings=often | AUTHORS[theirs]),
        Variant("ours", "default", "each state once", settings={"reuse": 1}),
        Variant("ours", "default", "each state 4 times", settings=often),
        Variant("ours", "default", "4 times, of the last 4 batches", settings=often | {"reuse_from": 4}),
        Variant("ours", "default", "4 times, half on policy", settings=often | {"on_policy": 0.5}),
    ]
    return [variant for variant in found if layout == "unet" or variant.adapter == "default"]


class Bench:
    """What all variants have in common. `share`: of the full size."""

    def __init__(self, experiment, share: float, held_out: int):
        from comfyui_agd.benchmarks.authors_recipe import STEPS
        from comfyui_agd.examples.toy.sampling import held_out_captions

        self.experiment = experiment
        self.model, self.captions = experiment.model(), experiment.training_captions()
        self.held_out = held_out_captions(HELD_OUT, 29)[1][:held_out]
        self.stored_captions = self.captions[: round(share * CAPTIONS)]
        self.evaluations = round(2 * len(self.stored_captions) * STEPS)

    def adapter_settings(self, kind: str) -> dict:
        """As the trainer has them, with the largest size within the budget."""
        from comfyui_agd.benchmarks.methods import BUDGET, settings_in, sized, widest

        settings = settings_in(self.model.base.layout) if kind == "default" else {"kind": kind}
        return sized(settings, widest(self.experiment, settings, BUDGET))

    @functools.cached_property
    def stored(self):
        """The trajectories of the paper's recipe."""
        from comfyui_agd.benchmarks import authors_recipe

        config = self.experiment.train_config()
        identity = {"captions": self.stored_captions, "omega_max": config.omega_max, "steps": authors_recipe.STEPS}
        size = (config.width, config.height)
        stored = self.experiment.work.tensors(
            "stored",
            "trajectories",
            identity,
            lambda: authors_recipe.store(self.model, self.stored_captions, size, config.omega_max),
        )
        return authors_recipe.StoredTrajectories(**stored)

    @functools.cached_property
    def held_out_gap(self):
        return self._measured_on(self.held_out)

    @functools.cached_property
    def choice_gap(self):
        """To choose between learning rates by."""
        return self._measured_on(self.experiment.choice_captions[: len(self.held_out)])

    def _measured_on(self, captions: list[str]):
        """As the trainer measures."""
        from comfyui_agd.training.held_out import HeldOutEvaluation, HeldOutPrompts
        from comfyui_agd.training.memory import BothPredictions

        encode, model = self.model.text_encoder.encode, self.model
        measured, (empty,) = encode(captions), encode([""], "negative")
        prompts = HeldOutPrompts(measured, [empty], measured[0], empty)
        both = BothPredictions(model.denoiser, model.memory, rows=2 * len(captions))
        return HeldOutEvaluation(model, self.experiment.train_config(), prompts, both)


def paper_rows(bench: Bench, variant: Variant) -> list[dict]:
    """By the authors' recipe: a row per measurement."""
    from comfyui_agd.benchmarks.authors_recipe import Distillation

    batch = bench.experiment.train_config().batch
    steps = round(bench.evaluations / 2 * SEEN / batch)
    rate = variant.rates[0]
    if len(variant.rates) > 1:
        gaps = {rate: _gap_of_rate(bench, variant, rate, round(TRIED * steps), batch) for rate in variant.rates}
        rate = max(gaps, key=gaps.get)
    start, found = time.perf_counter(), []

    def after(done: int, adapter) -> None:
        if done % max(1, steps // MEASUREMENTS) == 0 or done == steps:
            found.append((done, bench.held_out_gap.measure(adapter, _of_phase)))

    _distil(bench, variant, Distillation(rate, steps, batch), after)
    seconds = time.perf_counter() - start
    return [
        _row(variant, rate, done, bench.evaluations, gap.score, gap.summary()["gap_closed"], seconds)
        for done, gap in found
    ]


def _gap_of_rate(bench: Bench, variant: Variant, rate: float, steps: int, batch: int) -> float:
    """On the captions for the choice, after so many steps; no gap where it diverged."""
    from comfyui_agd.benchmarks.authors_recipe import Distillation

    adapter = _distil(bench, variant, Distillation(rate, steps, batch))
    with bench.model.denoiser.session():
        gap = bench.choice_gap.measure(adapter, _of_phase).score
    print(f"{variant.full_name}: {gap:.3f} after {steps} steps at {rate:g}", file=sys.stderr, flush=True)
    return gap if math.isfinite(gap) else -math.inf


def _distil(bench: Bench, variant: Variant, distillation, after=lambda done, adapter: None):
    """A new adapter, trained. `after(done, adapter)` is called after every step."""
    from comfyui_agd.training.run_setup import new_adapter

    model, encode = bench.model, bench.model.text_encoder.encode
    positive, (negative,) = encode(bench.stored_captions), encode([""], "negative")
    config = bench.experiment.train_config(**bench.adapter_settings(variant.adapter))
    unconditional = model.text_encoder.context(negative)
    line = ProgressLine(variant.full_name, distillation.steps)
    stored = bench.stored  # rolled out in a session of its own, which can't be inside of another
    with model.denoiser.session():
        adapter_config = config.adapter_config(model.base, prompt_tokens=len(unconditional))
        adapter = new_adapter(adapter_config, config.seed, unconditional, model.denoiser.device)

        def after_step(done: int) -> None:
            line(done)
            after(done, adapter)

        distillation(model.denoiser, adapter, stored, positive, negative, after_step)
    return adapter


def our_rows(bench: Bench, variant: Variant) -> list[dict]:
    """By the trainer's recipe: a row per measurement."""
    from comfyui_agd.training.run_setup import RunOptions
    from comfyui_agd.training.trainer import Callbacks, train

    config = our_config(bench, variant)
    line, start = ProgressLine(variant.full_name, config.iterations), time.perf_counter()
    callbacks = Callbacks(lambda progress: line(progress.step) if progress.phase == "train" else None)
    model = bench.experiment.model()  # a training releases its text encoder
    trained = train(model, bench.captions, config, callbacks, RunOptions(held_out=bench.held_out))
    seconds, spent = time.perf_counter() - start, trained.info.training["teacher_evaluations"]
    rows, steps = [], config.iterations // config.reuse
    for entry in trained.history:
        # Evaluations are spent along the way; what starting the pool's columns took comes first.
        left = 2 * config.batch * (steps - entry.step // config.reuse)
        rows.append(
            _row(variant, config.learning_rate, entry.step, spent - left, entry.score, entry.gap_closed, seconds)
        )
    return rows


def our_config(bench: Bench, variant: Variant):
    """With a tenth of the evaluations of the paper's recipe."""
    settings = {"pool": 4, **variant.settings, **bench.adapter_settings(variant.adapter)}
    config = bench.experiment.train_config(**settings)
    # What filling the pool spends, at a mean phase of 9.5 steps, comes off the budget.
    fresh = max(8, (bench.evaluations // 10 - 2 * config.pool * config.batch * 10) // (2 * config.batch))
    # Measured when all that was spent was learnt from.
    every = max(1, fresh // MEASUREMENTS) * config.reuse
    return dataclasses.replace(config, iterations=fresh * config.reuse, evaluate_every=every)


def _row(
    variant: Variant, rate: float, step: int, evaluations: int, gap: float, by_omega: dict, seconds: float
) -> dict:
    return {
        "recipe": variant.recipe,
        "adapter": variant.adapter,
        "variant": variant.name,
        "learning_rate": rate,
        "iteration": step,
        "teacher_evaluations": evaluations,
        "gap_closed": round(gap, 4),
        "gap_closed_by_omega": by_omega,
        "training_seconds": round(seconds),
    }


def _of_phase(phase: str):
    from comfyui_agd.training.model import no_progress

    return no_progress


@dataclass(frozen=True)
class ProgressLine:
    """On standard error: how far a training is."""

    name: str
    total: int

    def __call__(self, done: int) -> None:
        if done % 50 == 0 or done == self.total:
            end = "\n" if done == self.total else ""
            print(f"\r{self.name}: {done}/{self.total}", end=end, file=sys.stderr, flush=True)


_COLUMNS = (
    Column("recipe", lambda row: row["recipe"]),
    Column("adapter", lambda row: f"`{row['adapter']}`" if row["adapter"] != "default" else "default"),
    Column("variant", lambda row: row["variant"]),
    Column("learning rate", lambda row: f"{row['learning_rate']:g}"),
    Column("iterations", lambda row: f"{row['iteration']:,}"),
    Column("teacher evaluations", lambda row: f"{row['teacher_evaluations']:,}"),
    Column("gap closed", lambda row: f"{row['gap_closed']:.3f}"),
    Column("by omega", lambda row: " / ".join(f"{gap:.3f}" for gap in row["gap_closed_by_omega"].values())),
    Column("s", lambda row: str(row["training_seconds"])),
)


def _name(row: dict) -> tuple[str, str, str]:
    return (row["recipe"], row["adapter"], row["variant"])


def _last(rows: list[dict]) -> list[dict]:
    """Of each variant the last measurement."""
    return list({_name(row): row for row in rows}.values())


def reached(rows: list[dict]) -> list[str]:
    """For each of ours: with how few evaluations it has what the paper's recipe has in the end."""
    by_paper = [row for row in _last(rows) if row["recipe"] == "paper"]
    if not by_paper:
        return []
    best, lines = max(by_paper, key=lambda row: row["gap_closed"]), []
    for name in dict.fromkeys(_name(row) for row in rows if row["recipe"] == "ours"):
        first = next((r for r in rows if _name(r) == name and r["gap_closed"] >= best["gap_closed"]), None)
        found = "not reached"
        if first:
            share = best["teacher_evaluations"] / first["teacher_evaluations"]
            found = f"at {first['teacher_evaluations']:,}, 1/{share:.0f} of them ({first['gap_closed']:.3f})"
        lines.append(f"- {', '.join(name)}: {found}.")
    head = (
        f"The best of the paper's recipe, {best['gap_closed']:.3f} after {best['teacher_evaluations']:,} evaluations:\n"
    )
    return [head, *lines]


def page(rows: list[dict], base, share: float, made: str) -> str:
    """`share`: of the full size."""
    how = f" --base {base.name}" + (f" --share {share:g}" if share != 1 else "")
    captions = round(share * CAPTIONS)
    omegas = " / ".join(rows[0]["gap_closed_by_omega"])
    without = "" if base.name == "toy" else _WITHOUT_THEIRS
    text, tried = "\n".join(reached(rows)), ", ".join(f"{rate:g}" for rate in RATES)
    return f"""# What a training recipe costs

`python benchmarks/recipe.py{how}`, {made}. Written by the command; one seed each.

{base.title.capitalize()}, batch 16, omega up to 6, adapters of at most 5 % of its parameters; measured on {HELD_OUT}
held-out captions at omega {omegas}, at eight of twenty noise levels. Seconds depend on what else the machine did, and
are without storing trajectories and trying learning rates.

{markdown_table(_COLUMNS, _last(rows))}

{text}

![gap closed against teacher evaluations]({named_for("recipe", base.name)}.png)

**paper**: the recipe of the paper's authors, as their code has it ([authors_recipe.py](../authors_recipe.py)), at
1/{8 / share:g} of its size: {captions} of 500 captions. Their trajectories of 1000 DDPM steps are stored in fp16
before, with one omega each, drawn uniformly; steps of batch 16 see {SEEN:.0%} of the states, once each. Plain MSE on
the model's own output, AdamW without weight decay, 10 % linear warm-up from a ten-thousandth of the learning rate and a
cosine back to that; no clipping, no moving average. `paper_attention` is their own adapter, which knows t and the
prompt. *Tuned*: of {tried} the rate that closes most of the gap on 16 captions kept for this choice, after a
quarter of the steps.{without}

**ours**: trajectories of 15 to 25 steps rolled out while training, a new caption each; balanced loss, log-uniform
omega, a moving average; a tenth of the evaluations. *4 times*: each state four times, with another omega each time, of
the last 256 batches unless it says otherwise. *Their loss*: plain, with uniform omega.
"""


_WITHOUT_THEIRS = """ Their adapter has no
place in this base: it is defined for the cross-attentions of UNets, and for transformers that know a class."""


def plot(rows: list[dict]):
    """Gap closed against teacher evaluations in thousands; the paper's are all spent before its first step."""
    names = list(dict.fromkeys(map(_name, rows)))
    most = max(row["teacher_evaluations"] for row in rows) / 1000
    highest = max(row["gap_closed"] for row in rows)
    widest = round(2.2 * most)  # to the right of the paper's is the key
    diagram = Diagram("Gap closed, mean over omega", 0, widest, 0.0, highest * 1.05, "teacher evaluations, k")
    colours = _COLOURS[: len(names)]
    for name, colour in zip(names, colours, strict=True):
        own = [row for row in rows if _name(row) == name]
        points = [(row["teacher_evaluations"] / 1000, max(0.0, row["gap_closed"])) for row in own]
        diagram.curve(points, colour, dots=True)
    diagram.key([", ".join(name) for name in names], colours)
    return diagram.image


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="a thirtieth of the size: shows that it runs")
    parser.add_argument("--base", choices=TOYS, default=TOYS[0], help="the base to distil")
    parser.add_argument("--share", type=float, default=1.0, help="of the size; what is kept is of one share")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="those whose recipe, adapter and name have this")
    add_work(parser, "recipe")
    add_results(parser, "recipe.md, .json and .png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.experiment import Sizes, ToyExperiment
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    name = named_for("recipe", args.base)
    experiment = ToyExperiment(WorkFolder(work_path(args, "recipe", args.base)), Sizes(), args.base)
    share = _QUICK if args.quick else args.share
    bench = Bench(experiment, share, held_out=4 if args.quick else HELD_OUT)
    known = variants(bench.model.base.layout)
    for i in selected([variant.full_name for variant in known], args.only or [""], "variant"):
        rows = {"paper": paper_rows, "ours": our_rows}[known[i].recipe](bench, known[i])
        experiment.work.save_rows(known[i].stem, rows)
    rows = experiment.work.rows(variant.stem for variant in known)
    publish(args, name, page(rows, experiment.base, share, made_on(args.device)), rows)
    if folder := results_folder(args):
        plot(rows).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()

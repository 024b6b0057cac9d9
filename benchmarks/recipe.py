"""What a training recipe costs: gap closed on held-out captions against the teacher's evaluations, on the toy.

Both sides in one run, on the same base, held-out captions and measurements:

- `paper`: the recipe of arXiv 2503.07274 in its proportions. There, 500 captions with one trajectory of the training
  schedule's 1000 steps and one guidance scale each are recorded first, 1.0 M teacher evaluations; then 5000 steps of
  batch 64 on shuffled states (64 % of them), uniform omega, plain MSE, AdamW with 10 % linear warm-up and a cosine.
  Here everything is an eighth: 64 captions, 128 k evaluations, 2560 steps of batch 16. The adapter is our
  re-implementation of the paper's, and gradients are clipped at 1, which theirs are not. Its learning rate, 1e-4, is a
  large model's; it is also trained with the toy's own, and the better one counts.
- `ours`: online rollouts with a tenth of those evaluations, balanced loss, log-uniform omega, our adapter; without
  and with `reuse`, of the last few batches and of many, and with half of the trajectories on the student's own policy.

    python benchmarks/recipe.py [--quick] [--only VARIANT ...] [--json FILE] [--plot FILE] [--device cpu]
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import benchmark_parser
from comfyui_agd.benchmarks.output import write_rows
from comfyui_agd.examples.toy.tables import Column, console_table
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.plot import Diagram

OMEGA_MAX, BATCH, HELD_OUT, MEASUREMENTS = 6.0, 16, 32, 8
CAPTIONS, STEPS, SEEN = 64, 1000, 0.64
_COLOURS = ("#888888", "#222222", "#2f8f4e", "#1f5fbf", "#c2571a", "#7a3fb0")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`recipe` is "paper" or "ours"; what is not set here is as the trainer has it."""

    recipe: str
    variant: str
    config: TrainConfig


def recipes(share: float) -> list[Recipe]:
    """`share` of the full size."""
    seen = round(share * CAPTIONS * STEPS * SEEN / BATCH)
    tenth = round(share * CAPTIONS * STEPS * 2 / 10)
    # What filling the pool spends, 64 trajectories at a mean phase of 9.5 steps, comes off the budget.
    fresh = max(8, (tenth - 2 * 4 * BATCH * 10) // (2 * BATCH))
    common = TrainConfig(
        batch=BATCH,
        omega_max=OMEGA_MAX,
        width=64,
        height=64,
        kind="cross_attention",
        hidden=56,
        encoder_width=64,
        learning_rate=2e-3,
        reuse=1,
        preview_every=0,
    )
    paper = dataclasses.replace(
        common,
        iterations=seen,
        omega_sampling="uniform",
        loss="plain",
        ema=0.0,
        gain=False,
        omega_embedding="fourier",
        shared_encoder=False,
    )
    ours = dataclasses.replace(common, iterations=fresh, pool=4, steps_min=15, steps_max=25)
    reused = dataclasses.replace(ours, iterations=4 * fresh, reuse=4, reuse_from=4)
    found = [
        Recipe("paper", "its learning rate, 1e-4", dataclasses.replace(paper, learning_rate=1e-4)),
        Recipe("paper", "the toy's learning rate, 2e-3", paper),
        Recipe("ours", "each state once", ours),
        Recipe("ours", "each state 4 times", reused),
        Recipe("ours", "4 times, half on policy", dataclasses.replace(reused, on_policy=0.5)),
        Recipe("ours", "4 times, of the last 256 batches", dataclasses.replace(reused, reuse_from=256)),
    ]
    return [
        dataclasses.replace(r, config=dataclasses.replace(r.config, evaluate_every=_every(r.config))) for r in found
    ]


def _every(config: TrainConfig) -> int:
    """Iterations between measurements, a multiple of `reuse`, for then all that was spent was learnt from."""
    return max(1, config.iterations // MEASUREMENTS // config.reuse) * config.reuse


class RecordedTrajectories:
    """Whole trajectories of the training schedule, all of one caption each, recorded before training begins.

    Stands in for `training.recording`, which records what online training visits: here every state of a trajectory is
    kept, in half precision as the authors do, and drawn without replacement.
    """

    def __init__(self, model, captions: list[str]):
        from comfyui_agd.agd_core.guidance import cfg
        from comfyui_agd.training.solvers import solver_step

        denoiser, encode = model.denoiser, model.text_encoder.encode
        rows, shape = len(captions), denoiser.latent_shape(64, 64)
        generator = torch.Generator().manual_seed(11)
        self.omega = 1 + (OMEGA_MAX - 1) * torch.rand(rows, generator=generator)
        sigmas = denoiser.sigmas("normal", STEPS)
        positive, negative = encode(captions), encode([""], "negative") * rows
        self.x, self.cond, self.uncond = torch.zeros(3, STEPS, rows, *shape, dtype=torch.float16).unbind()
        self.sigma = sigmas[:-1]
        with denoiser.session():
            x = denoiser.start(torch.randn(rows, *shape, generator=generator), sigmas[:1].expand(rows))
            for i in range(STEPS):
                sigma, sigma_next = sigmas[i].expand(rows), sigmas[i + 1].expand(rows)
                cond, uncond = denoiser.denoise(x, sigma, positive), denoiser.denoise(x, sigma, negative)
                self.x[i], self.cond[i], self.uncond[i] = x, cond, uncond
                target = cfg(cond, uncond, self.omega)
                x = solver_step(x, target, sigma, sigma_next)
        self.evaluations = 2 * STEPS * rows
        self.identity = {"prompts": captions}

    def check_texts(self, own: list[str], positive: list[str], negative: list[str]) -> None:
        """They are the same, for both come from `main`."""

    def checksum(self) -> str:
        return f"{self.evaluations} evaluations"

    def source(self, config: TrainConfig, rows: range) -> "RecordedTrajectories":
        self.order = torch.randperm(self.x.shape[0] * self.x.shape[1], generator=torch.Generator().manual_seed(12))
        return self

    def next(self, step: int, progress=None):
        from comfyui_agd.training.pool import Batch

        drawn = self.order[step * BATCH : (step + 1) * BATCH]
        at, row = drawn // self.x.shape[1], drawn % self.x.shape[1]
        states = {name: getattr(self, name)[at, row].float() for name in ("x", "cond", "uncond")}
        return Batch(
            **states, sigma=self.sigma[at], omega=self.omega[row], positive=row, negative=torch.zeros_like(row)
        )

    def restore_generators(self) -> None:
        pass

    def advance(self, batch, student, progress) -> int:
        return 0

    def state_dict(self) -> tuple[dict, dict]:
        return {}, {}


def measure(
    model, recipe: Recipe, captions: list[str], held_out: list[str], recorded: RecordedTrajectories | None
) -> list[dict]:
    """A row per measurement."""
    from comfyui_agd.training.run_setup import RunOptions
    from comfyui_agd.training.trainer import Callbacks, train

    start, bar = time.perf_counter(), ProgressLine(f"{recipe.recipe}, {recipe.variant}")
    options = RunOptions(held_out=held_out, recording=recorded)
    trained = train(model, captions, recipe.config, Callbacks(bar), options)
    seconds, spent = time.perf_counter() - start, trained.info.training["teacher_evaluations"]
    rows = []
    for entry in trained.history:
        # Online, evaluations are spent along the way; what starting the pool's columns took comes first.
        steps = recipe.config.iterations // recipe.config.reuse
        left = 0 if recorded else 2 * BATCH * (steps - entry.step // recipe.config.reuse)
        rows.append(
            {
                "recipe": recipe.recipe,
                "variant": recipe.variant,
                "iteration": entry.step,
                "teacher_evaluations": spent - left,
                "gap_closed": round(entry.score, 4),
                "gap_closed_by_omega": entry.gap_closed,
                "training_seconds": round(seconds),
            }
        )
    return rows


class ProgressLine:
    """One line on standard error: how far a recipe is."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, progress) -> None:
        if progress.phase == "train" and (progress.step % 50 == 0 or progress.step == progress.total):
            gap = "" if progress.gap_closed is None else f", gap closed {progress.gap_closed:.3f}"
            print(f"\r{self.name}: {progress.step}/{progress.total}{gap}", end="", file=sys.stderr, flush=True)
            if progress.step == progress.total:
                print(file=sys.stderr)


_COLUMNS = (
    Column("recipe", lambda row: row["recipe"], -8),
    Column("variant", lambda row: row["variant"], -32),
    Column("iterations", lambda row: f"{row['iteration']:,}", 11),
    Column("teacher evals", lambda row: f"{row['teacher_evaluations']:,}", 15),
    Column("gap closed", lambda row: f"{row['gap_closed']:.3f}", 12),
    Column("seconds", lambda row: str(row["training_seconds"]), 9),
)


def print_table(rows: list[dict]) -> None:
    print(*console_table(_COLUMNS, _last(rows)), sep="\n")
    paper = max(row["gap_closed"] for row in _last(rows) if row["recipe"] == "paper")
    spent = max(row["teacher_evaluations"] for row in rows if row["recipe"] == "paper")
    reached = [r for r in rows if r["recipe"] == "ours" and r["gap_closed"] >= paper]
    if reached:
        first = min(reached, key=lambda row: row["teacher_evaluations"])
        print(
            f"Ours ({first['variant']}) reaches the paper recipe's final gap, {paper:.3f}, with "
            f"{first['teacher_evaluations']:,} teacher evaluations: 1/{spent / first['teacher_evaluations']:.1f} of its"
        )
    else:
        print(f"Ours does not reach the paper recipe's final gap, {paper:.3f}.")


def _last(rows: list[dict]) -> list[dict]:
    return list({(row["recipe"], row["variant"]): row for row in rows}.values())


def plot(rows: list[dict], file: Path) -> None:
    """Gap closed against teacher evaluations in thousands; the paper's are all spent before its first step."""
    names = list(dict.fromkeys((row["recipe"], row["variant"]) for row in rows))
    most = max(row["teacher_evaluations"] for row in rows) / 1000
    highest = max(row["gap_closed"] for row in rows)
    diagram = Diagram(
        "Gap closed, mean over omega", 0, round(most * 1.02), 0.0, highest * 1.05, "teacher evaluations, k"
    )
    for name, colour in zip(names, _COLOURS, strict=True):
        own = [row for row in rows if (row["recipe"], row["variant"]) == name]
        points = [(row["teacher_evaluations"] / 1000, max(0.0, row["gap_closed"])) for row in own]
        diagram.curve(points, colour, dots=True)
    diagram.key([": ".join(name) for name in names], _COLOURS)
    file.parent.mkdir(parents=True, exist_ok=True)
    diagram.image.save(file)


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="a thirtieth of the size: shows that it runs")
    parser.add_argument("--plot", type=Path, help="draw the curves there (PNG)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these; the others' rows stay as in --json's file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    use_comfyui(cpu=args.device == "cpu")
    rows: list[dict] = []
    share = 1 / 32 if args.quick else 1.0
    chosen = [recipe for recipe in recipes(share) if not args.only or recipe.variant in args.only]
    if args.only and args.json and args.json.exists():
        rows = [row for row in json.loads(args.json.read_text()) if row["variant"] not in args.only]
    rows += measure_all(chosen, few=round(share * CAPTIONS), held_out=4 if args.quick else HELD_OUT)
    print_table(rows)
    if args.plot:
        plot(rows, args.plot)
    if args.json:
        write_rows(args.json, rows)


def measure_all(chosen: list[Recipe], few: int, held_out: int) -> list[dict]:
    """`few`: how many captions the paper's recipe is given; `held_out`: how many the gap is measured on."""
    from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
    from comfyui_agd.examples.toy.sampling import Toy, captions_of, held_out_captions
    from comfyui_agd.examples.toy.scenes import draw_scenes

    toy, captions = Toy.load(), captions_of(draw_scenes(2000, 3, held=False))
    measured_on, recorded, rows = held_out_captions(HELD_OUT, 29)[1][:held_out], None, []
    if any(recipe.recipe == "paper" for recipe in chosen):
        start = time.perf_counter()
        recorded = RecordedTrajectories(ComfyModel(toy.model, toy.clip), captions[:few])
        print(f"Recorded {recorded.evaluations:,} evaluations in {time.perf_counter() - start:.0f} s.", file=sys.stderr)
    for recipe in chosen:
        model, paper = ComfyModel(toy.model, toy.clip), recipe.recipe == "paper"
        texts = captions[:few] if paper else captions
        rows += measure(model, recipe, texts, measured_on, recorded if paper else None)
    return rows


if __name__ == "__main__":
    main()

"""How an adapter does where it was not trained: other guidance scales, prompts, sizes, samplers, checkpoints, LoRAs.

    python benchmarks/extrapolation.py [--base toy|toy-dit ...] [--quick] [--only SECTION ...] [--work DIR]
                                       [--json FILE] [--device cuda]

Takes `quality.py`'s adapter `--adapter` from its work folders, or trains it. Where its error is along the noise levels,
and what each part of it does to pictures, is measured too; all of its pictures are beside CFG's, at as many steps and
at as many evaluations. Writes extrapolation.md and extrapolation.json, of the toy transformer extrapolation-toy-dit.md
and .json, which hold every section that the work folder has of this adapter.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import (
    add_results,
    add_toys,
    add_work,
    benchmark_parser,
    named_for,
    work_path,
)
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import Figure, columns_of, publish_page, tables_by_section, with_errors, write_rows
from comfyui_agd.examples.toy.tables import Column

OMEGAS = (1.5, 2.0, 3.0, 5.0, 6.0, 8.0, 12.0)
SIZES = ((48, 48), (64, 64), (64, 96), (96, 96), (128, 128))
SIZE_CAPTIONS = 32  # whose pictures of these sizes are compared with CFG's
SAMPLERS = (("dpmpp_2m", "karras"), ("euler_ancestral", "normal"))
STEP_COUNTS = (5, 10, 20)
# Shares of the steps in which the adapter works; in the others it is CFG.
PARTS = ((0.0, 0.2), (0.2, 0.5), (0.5, 1.0))
SIBLING_STEPS, SIBLING_BATCH, SIBLING_POOL, LORA_RANK = 2400, 32, 4000, 16
_SEED = 101


def recoloured(images: torch.Tensor) -> torch.Tensor:
    """What is red becomes green, green blue, blue red: (n, 3, h, w)."""
    return images.roll(1, dims=1)


def coloured_back(images: torch.Tensor) -> torch.Tensor:
    return images.roll(-1, dims=1)


class AdapterStudy:
    """The adapter in the experiment, and how it does somewhere. `rows`: of the section that is being measured."""

    def __init__(self, experiment, name: str, sibling_steps: int):
        from comfyui_agd.agd_core import adapter_file
        from comfyui_agd.benchmarks.methods import METHODS

        self.experiment, self.name, self.sibling_steps = experiment, name, sibling_steps
        self.best_omega, self.base = experiment.best_omega, experiment.parts.model
        self.method, self.cfg = (METHODS[each].prepare(experiment, each) for each in (name, "cfg"))
        self.info, self.adapter = adapter_file.load(self.method.file)
        self.rows: list[dict] = []

    def add(self, section: str, setting: str, **values) -> None:
        self.rows.append({"model": self.experiment.base.name, "section": section, "setting": setting} | values)
        print(json.dumps(self.rows[-1]), flush=True)

    def patched(self, model, **options):
        """`model` with the adapter."""
        from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
        from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings

        settings = GuidanceSettings(**options)
        return apply_adapter(model, self.info, self.adapter.state_dict(), settings, source="the adapter")

    @property
    def captions(self) -> list[str]:
        from comfyui_agd.examples.toy.sampling import held_out_captions

        return held_out_captions(self.experiment.sizes.gap_captions, _SEED)[1]

    def trajectories(self, omega: float | None = None, captions: list[str] | None = None, **how):
        """To measure the gap on: by default at the best omega, of new captions. `how`: of `CaptionTrajectories`."""
        from comfyui_agd.benchmarks.experiment import KEPT_STEPS
        from comfyui_agd.examples.toy.gap import CaptionTrajectories

        how = {"scheduler": self.experiment.base.scheduler, "keep": KEPT_STEPS} | how
        return CaptionTrajectories(captions or self.captions, [omega or self.best_omega], _SEED, **how)

    def gap(self, wanted, model=None) -> dict:
        """Gap closed and cosine, over blocks of the captions of these trajectories; `model`: another base."""
        from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
        from comfyui_agd.benchmarks import metrics
        from comfyui_agd.benchmarks.experiment import in_blocks
        from comfyui_agd.examples.toy.gap import teacher_states
        from comfyui_agd.training.gap import evaluate

        own, found = ComfyModel(model or self.base, self.experiment.parts.clip), []
        for i, block in enumerate(in_blocks(wanted.captions)):
            states = teacher_states(own, replace(wanted, captions=block, seed=wanted.seed + i))
            with own.denoiser.session():
                found.append(evaluate(own.denoiser, self.adapter.to(own.denoiser.device), states))
        (omega,) = wanted.omegas
        measured = {
            key: metrics.mean_and_error(torch.tensor([getattr(each, key)[omega] for each in found]))
            for key in ("gap_closed", "direction_cosine")
        }
        return with_errors(measured) | {"by_sigma": [[s, round(g, 3)] for s, g in found[0].by_sigma[omega]]}

    def pictures(self, name: str, method, at, base=None, **shown) -> dict:
        """Prompt accuracy, Fréchet distance and the distance to CFG's pictures. `base`: (name, method) of what that CFG
        is of, if not of the experiment's base; `shown`: what the judge is to see."""
        made = self.experiment.samples(name, method, at, **shown)
        # What has no guidance scale is compared with CFG at its best.
        compared = at if at.omega > 1 else replace(at, omega=self.best_omega)
        distance = self.experiment.distance_to_cfg(made, compared, *(base or ()))
        measured = self.experiment.accuracy_and_distance(made) | {"distance_to_cfg": distance}
        per_picture = made.evaluations.item() / len(made.correct)
        row = {"evaluations_per_step": round(per_picture / at.steps, 2), "evaluations": round(per_picture, 1)}
        return row | with_errors(measured)

    def ways(self, at) -> list[tuple]:
        """(name, method, how it is sampled): CFG, CFG with half the steps, as many evaluations as the adapter has, and
        the adapter."""
        half = replace(at, steps=-(-at.steps // 2))
        return [("cfg", self.cfg, at), ("cfg", self.cfg, half), (self.name, self.method, at)]

    def latents(self, model, omega: float, steps: int, size: tuple[int, int]) -> torch.Tensor:
        """Of a few captions' pictures of that width and height."""
        from comfyui_agd.examples.toy.sampling import encode, sample_latents

        parts = self.experiment.parts
        positive, negative = (encode(parts.clip, texts)[0] for texts in (self.captions[:SIZE_CAPTIONS], [""]))
        settings = replace(parts.settings(omega, _SEED, steps), size=size)
        return sample_latents(model, positive, negative, settings)["samples"]


def omegas(study: AdapterStudy) -> None:
    for omega in OMEGAS:
        study.add("Guidance scale", f"omega {omega:g}", **study.gap(study.trajectories(omega)))


def prompts(study: AdapterStudy) -> None:
    from comfyui_agd.examples.toy.scenes import draw_scenes, partial_caption

    count, rng = study.experiment.sizes.gap_captions, random.Random(_SEED)
    scenes = draw_scenes(count, _SEED, held=True)
    for name, texts in (
        ("captions of the training", study.experiment.training_captions()[:count]),
        ("new captions", study.captions),
        ("new captions that leave things open", [partial_caption(scene, rng) for scene in scenes]),
        ("a shape alone", [f"a {scene.things[0].shape}" for scene in scenes]),
    ):
        study.add("Prompts", name, **study.gap(study.trajectories(captions=texts)))


def sizes(study: AdapterStudy) -> None:
    """No judge knows pictures of other sizes: how far they are from CFG's is all that is measured of them."""
    from comfyui_agd.benchmarks import metrics
    from comfyui_agd.benchmarks.experiment import TRUE_STEPS, SampledAt

    for size in SIZES:
        target, far = (study.latents(study.base, omega, TRUE_STEPS, size) for omega in (study.best_omega, 1.0))
        for name, method, at in study.ways(SampledAt(study.best_omega)):
            own = study.latents(method.model, at.omega, at.steps, size)
            found = with_errors({"distance_to_cfg": metrics.relative_distance(own, target, far)})
            gap = study.gap(study.trajectories(size=size)) if name == study.name else {}
            per_picture = at.steps * (2 if name == "cfg" else 1)
            setting = f"{size[0]} x {size[1]} pixels, {at.steps} steps, {name}"
            study.add("Size", setting, **gap, evaluations=per_picture, **found)


def schedules(study: AdapterStudy) -> None:
    for scheduler in ("normal", "karras", "simple", "exponential"):
        for steps in (10, 50):
            wanted = study.trajectories(scheduler=scheduler, steps=steps)
            study.add("Schedule", f"{scheduler}, {steps} steps", **study.gap(wanted))


def samplers(study: AdapterStudy) -> None:
    from comfyui_agd.benchmarks.experiment import SampledAt

    own = ("euler", study.experiment.base.scheduler)
    for names in ((*own, steps) for steps in STEP_COUNTS):
        _sampled(study, SampledAt(study.best_omega, names[2]), *own)
    for sampler, scheduler in SAMPLERS:
        _sampled(study, SampledAt(study.best_omega, 20, sampler, scheduler), sampler, scheduler)


def _sampled(study: AdapterStudy, at, sampler: str, scheduler: str) -> None:
    """Rows of all ways; CFG's half of the steps may be there as all of another row's."""
    known = {row["setting"] for row in study.rows}
    for name, method, each in study.ways(at):
        if (setting := f"{sampler}, {scheduler}, {each.steps} steps, {name}") not in known:
            study.add("Samplers", setting, **study.pictures(name, method, each))


def noise(study: AdapterStudy) -> None:
    """Each part of the adapter, beside CFG with as many steps as so many evaluations allow."""
    from comfyui_agd.benchmarks.experiment import PreparedMethod, SampledAt

    at, section = SampledAt(study.best_omega), "Noise levels"
    for name, method, each in study.ways(at):
        study.add(section, f"{name}, {each.steps} steps", **study.pictures(name, method, each))
    for start, end in PARTS:
        model = study.patched(study.base, start_percent=start, end_percent=end)
        method = PreparedMethod(model, study.method.identity | {"start": start, "end": end})
        found = study.pictures(f"{study.name}-{start}-{end}", method, at)
        study.add(section, f"the adapter from {start:.0%} to {end:.0%}, else CFG, {at.steps} steps", **found)
        as_many = replace(at, steps=round(found["evaluations"] / 2))
        study.add(section, f"cfg, {as_many.steps} steps", **study.pictures("cfg", study.cfg, as_many))


def sibling(study: AdapterStudy) -> None:
    """A checkpoint fine-tuned on other colours, and the same change as a LoRA on the base."""
    import comfy.sd

    tuned = _fine_tuned(study.experiment.base, study.experiment.work.folder / "sibling", study.sibling_steps)
    lora = lora_between(study.base, tuned)
    half, full = (comfy.sd.load_lora_for_models(study.base, None, lora, strength, 0.0)[0] for strength in (0.5, 1.0))
    names = ("base", "sibling", "base with a LoRA of strength 0.5", "base with a LoRA of strength 1")
    for name, model in zip(names, (study.base, tuned, half, full), strict=True):
        study.add("Sibling and LoRA", name, **study.gap(study.trajectories(), model))
    _sibling_pictures(study, {"sibling": tuned, "sibling-lora": full})


def _sibling_pictures(study: AdapterStudy, models: dict) -> None:
    """Of these MODELs without guidance, with CFG, with half of its steps, and with the adapter."""
    from comfyui_agd.benchmarks.experiment import PreparedMethod, SampledAt

    identity, at = study.method.identity | {"sibling": study.sibling_steps}, SampledAt(study.best_omega)
    for name, model in models.items():
        own, adapted = (PreparedMethod(each, identity) for each in (model, study.patched(model)))
        for way, method, each in (
            ("unguided", own, replace(at, omega=1.0)),
            ("cfg", own, at),
            ("cfg", own, replace(at, steps=at.steps // 2)),
            (study.name, adapted, at),
        ):
            # The judge knows the old colours only.
            found = study.pictures(f"{name}-{way}", method, each, base=(own, f"{name}-"), transform=coloured_back)
            study.add("Sibling and LoRA", f"{name}-{way}, {each.steps} steps", **found)


def _fine_tuned(base, folder: Path, steps: int):
    """A MODEL: the toy's, trained on in other colours; its text encoder and VAE are the toy's."""
    from comfyui_agd.benchmarks.work_folder import make_once
    from comfyui_agd.examples.toy import train

    def make() -> None:
        torch.manual_seed(_SEED)
        train.fine_tune(base, train.DiffusionStage("sibling", steps, SIBLING_BATCH, SIBLING_POOL, recoloured), folder)

    make_once(folder / f"trained-{steps}", make)
    return base.load(folder / base.file)


def lora_between(base, tuned) -> dict[str, torch.Tensor]:
    """The best LoRA of a given rank for the difference of two MODELs, as ComfyUI reads it."""
    before, after = (m.model.diffusion_model.state_dict() for m in (base, tuned))
    lora = {}
    for key, weight in before.items():
        if weight.ndim < 2:
            continue
        u, s, v = torch.linalg.svd((after[key] - weight).float().flatten(1), full_matrices=False)
        root, name = s[:LORA_RANK].sqrt(), f"diffusion_model.{key.removesuffix('.weight')}"
        up, down = u[:, :LORA_RANK] * root, root[:, None] * v[:LORA_RANK]
        if weight.ndim == 4:
            up, down = up[:, :, None, None], down.reshape(-1, *weight.shape[1:])
        lora |= {f"{name}.lora_up.weight": up.contiguous(), f"{name}.lora_down.weight": down.contiguous()}
    return lora


SECTIONS: dict[str, Callable[[AdapterStudy], None]] = {
    "omegas": omegas,
    "prompts": prompts,
    "sizes": sizes,
    "schedules": schedules,
    "noise": noise,
    "sibling": sibling,
    "samplers": samplers,
}
_FIGURES = (
    Figure("gap closed", "gap_closed"),
    Figure("cosine", "direction_cosine"),
    Figure("evaluations per picture", "evaluations", 1, 0),
    Figure("prompt accuracy, %", "prompt_accuracy", 100, 1),
    Figure("Fréchet to real", "frechet_to_real", 1, 1),
    Figure("distance to CFG's picture", "distance_to_cfg"),
)


def _about_sibling(rows: list[dict]) -> str:
    if not any(row["section"].startswith("Sibling") for row in rows):
        return ""
    return f"""
The sibling is the base trained for {SIBLING_STEPS} more steps on pictures whose colours are exchanged (red for green,
green for blue, blue for red); its pictures are judged with the colours changed back. The LoRA is the best one of rank
{LORA_RANK} for the same change.
"""


def _columns_for(rows: list[dict]) -> list[Column]:
    measured = [figure for figure in _FIGURES if any(row.get(figure.key) is not None for row in rows)]
    return [Column("setting", lambda row: row["setting"]), *columns_of(measured)]


def page(rows: list[dict], experiment, adapter: str, made: str) -> str:
    from comfyui_agd.benchmarks.experiment import TRUE_STEPS

    sizes, base, config = experiment.sizes, experiment.base, experiment.train_config()
    levels = next((row["by_sigma"] for row in rows if row["setting"] == f"omega {experiment.best_omega:g}"), [])
    along = ", ".join(f"{sigma:.2f}: {closed:.2f}" for sigma, closed in levels)
    return f"""# Where it was not trained

`python benchmarks/extrapolation.py --base {base.name}`, {made}. Written by the command.

The adapter is `{adapter}` of [{named_for("quality", base.name)}.md]({named_for("quality", base.name)}.md), trained on
{base.title} with omega up to {config.omega_max:g}, full captions, {config.width} x {config.height} pixels,
{config.steps_min} to {config.steps_max} steps of the schedulers {" and ".join(config.schedulers)}, and the base's own
weights. Gaps are on {sizes.gap_captions} held-out captions, accuracy and Fréchet distance on {sizes.pictures} pictures,
at omega {experiment.best_omega:g} and 20 steps where nothing else is said; errors are over captions and noise.

CFG is there with as many steps and with half of them, which are as many evaluations as one pass with all. The distance
is that of the final latents to CFG's own at {TRUE_STEPS} steps with the same sampler, captions and noise, over the
unguided ones' (the first {sizes.compared} pictures, {SIZE_CAPTIONS} of other sizes): 0 is CFG's picture. Samplers that
add noise have none, for with other numbers of steps it is other noise.
{_about_sibling(rows)}
Gap closed by noise level at omega {experiment.best_omega:g}, on an eighth of the captions: {along or "not measured"}.

{tables_by_section(rows, _columns_for)}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="few pictures, an adapter hardly trained")
    add_toys(parser)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    parser.add_argument("--adapter", default="ours_longer", help="a method of quality.py")
    parser.add_argument("--pictures", type=int, help="per setting")
    add_work(parser, "quality", what="quality.py's")
    add_results(parser, "extrapolation.md and .json, and those of the toy transformer")
    return parser.parse_args(argv)


def measure(experiment, args: argparse.Namespace) -> list[dict]:
    """The sections that are asked for, and all rows that there are of this adapter."""
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    study = AdapterStudy(experiment, args.adapter, sibling_steps=2 if args.quick else SIBLING_STEPS)
    kept = WorkFolder(experiment.work.folder / f"extrapolation-{args.adapter}")
    for section in args.only:
        study.rows = []
        SECTIONS[section](study)
        kept.save_rows(section, study.rows)
    return kept.rows(SECTIONS)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.experiment import QUICK_SIZES, Sizes, ToyExperiment
    from comfyui_agd.benchmarks.methods import METHODS
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    if args.adapter not in METHODS:
        sys.exit(f"There is no method {args.adapter}; benchmarks/quality.py --list says which there are.")
    sizes = QUICK_SIZES if args.quick else Sizes()
    sizes, rows = replace(sizes, pictures=args.pictures or sizes.pictures), []
    for base in args.base:
        experiment = ToyExperiment(WorkFolder(work_path(args, "quality", base)), sizes, base)
        own = measure(experiment, args)
        text = page(own, experiment, args.adapter, made_on(args.device))
        publish_page(args, named_for("extrapolation", base), text, own)
        rows += own
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()

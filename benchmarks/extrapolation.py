"""How an adapter does where it was not trained: other guidance scales, prompts, sizes, samplers, checkpoints, LoRAs.

    python benchmarks/extrapolation.py [--quick] [--only SECTION ...] [--work DIR] [--json FILE] [--device cuda]

Takes `quality.py`'s adapter `--adapter` from its work folder, or trains it. Where its error is along the noise levels,
and what each part of it does to pictures, is measured too. Writes extrapolation.md and extrapolation.json, which hold
every section that the work folder has of this adapter.
"""

import argparse
import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_results, add_work, benchmark_parser, work_path
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import Figure, columns_of, publish, tables_by_section, with_errors
from comfyui_agd.examples.toy.tables import Column

OMEGAS = (1.5, 2.0, 3.0, 5.0, 6.0, 8.0, 12.0)
SIZES = ((48, 48), (64, 64), (64, 96), (96, 96), (128, 128))
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
        from comfyui_agd.examples.toy.measure import omega_star

        self.experiment, self.name, self.sibling_steps = experiment, name, sibling_steps
        self.best_omega, self.base = omega_star(), experiment.parts.model
        self.method, self.cfg = (METHODS[each].prepare(experiment, each) for each in (name, "cfg"))
        self.info, self.adapter = adapter_file.load(self.method.file)
        self.rows: list[dict] = []

    def add(self, section: str, setting: str, **values) -> None:
        self.rows.append({"model": "toy", "section": section, "setting": setting} | values)
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

        return CaptionTrajectories(captions or self.captions, [omega or self.best_omega], _SEED, keep=KEPT_STEPS, **how)

    def gap(self, wanted, model=None) -> dict:
        """Gap closed and cosine, over blocks of the captions of these trajectories; `model`: another base."""
        from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
        from comfyui_agd.benchmarks import metrics
        from comfyui_agd.benchmarks.experiment import in_blocks
        from comfyui_agd.examples.toy.gap import teacher_states
        from comfyui_agd.training.gap import evaluate

        own, found = ComfyModel(model or self.base, self.experiment.parts.clip), []
        for i, block in enumerate(in_blocks(wanted.captions)):
            states = teacher_states(own, dataclasses.replace(wanted, captions=block, seed=wanted.seed + i))
            with own.denoiser.session():
                found.append(evaluate(own.denoiser, self.adapter.to(own.denoiser.device), states))
        (omega,) = wanted.omegas
        measured = {
            key: metrics.mean_and_error(torch.tensor([getattr(each, key)[omega] for each in found]))
            for key in ("gap_closed", "direction_cosine")
        }
        return with_errors(measured) | {"by_sigma": [[s, round(g, 3)] for s, g in found[0].by_sigma[omega]]}

    def pictures(self, name: str, method, at, **shown) -> dict:
        """Prompt accuracy and Fréchet distance. `shown`: what the judge is to see."""
        made = self.experiment.samples(name, method, at, **shown)
        row = {"evaluations_per_step": round(made.evaluations_per_step(at.steps), 2)}
        return row | with_errors(self.experiment.accuracy_and_distance(made))


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
    for size in SIZES:
        study.add("Size", f"{size[0]} x {size[1]} pixels", **study.gap(study.trajectories(size=size)))


def schedules(study: AdapterStudy) -> None:
    for scheduler in ("normal", "karras", "simple", "exponential"):
        for steps in (10, 50):
            wanted = study.trajectories(scheduler=scheduler, steps=steps)
            study.add("Schedule", f"{scheduler}, {steps} steps", **study.gap(wanted))


def samplers(study: AdapterStudy) -> None:
    from comfyui_agd.benchmarks.experiment import SampledAt

    ways = [("euler", "normal", steps) for steps in STEP_COUNTS] + [(*names, 20) for names in SAMPLERS]
    for sampler, scheduler, steps in ways:
        usual = (sampler, scheduler) == ("euler", "normal")
        at = SampledAt(study.best_omega, steps, *(() if usual else (sampler, scheduler)))
        for name, method in (("cfg", study.cfg), (study.name, study.method)):
            found = study.pictures(name, method, at)
            study.add("Samplers", f"{sampler}, {scheduler}, {steps} steps, {name}", **found)


def noise(study: AdapterStudy) -> None:
    from comfyui_agd.benchmarks.experiment import PreparedMethod, SampledAt

    for start, end in PARTS:
        model = study.patched(study.base, start_percent=start, end_percent=end)
        method = PreparedMethod(model, study.method.identity | {"start": start, "end": end})
        found = study.pictures(f"{study.name}-{start}-{end}", method, SampledAt(study.best_omega))
        study.add("Noise levels", f"the adapter from {start:.0%} to {end:.0%}, else CFG", **found)


def sibling(study: AdapterStudy) -> None:
    """A checkpoint fine-tuned on other colours, and the same change as a LoRA on the base."""
    import comfy.sd

    tuned = _fine_tuned(study.experiment.work.folder / "sibling", study.sibling_steps)
    lora = _lora(study.base, tuned)
    half, full = (comfy.sd.load_lora_for_models(study.base, None, lora, strength, 0.0)[0] for strength in (0.5, 1.0))
    names = ("base", "sibling", "base with a LoRA of strength 0.5", "base with a LoRA of strength 1")
    for name, model in zip(names, (study.base, tuned, half, full), strict=True):
        study.add("Sibling and LoRA", name, **study.gap(study.trajectories(), model))
    _sibling_pictures(study, {"sibling": tuned, "sibling-lora": full})


def _sibling_pictures(study: AdapterStudy, models: dict) -> None:
    """Of these MODELs without guidance, with CFG and with the adapter."""
    from comfyui_agd.benchmarks.experiment import PreparedMethod, SampledAt

    identity = study.method.identity | {"sibling": study.sibling_steps}
    for name, model in models.items():
        for way, patched, omega in (
            ("unguided", model, 1.0),
            ("cfg", model, study.best_omega),
            (study.name, study.patched(model), study.best_omega),
        ):
            method = PreparedMethod(patched, identity)
            # The judge knows the old colours only.
            found = study.pictures(f"{name}-{way}", method, SampledAt(omega), transform=coloured_back)
            study.add("Sibling and LoRA", f"{name}-{way}", **found)


def _fine_tuned(folder: Path, steps: int):
    """A MODEL: the toy's, trained on in other colours; its text encoder and VAE are the toy's."""
    import comfy.utils

    from comfyui_agd.examples.toy import model as toy
    from comfyui_agd.examples.toy import train

    if not (folder / f"trained-{steps}").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(toy.WEIGHTS / "vae.safetensors", folder)
        torch.manual_seed(_SEED)
        model, text = toy.build_model(), train.new_text_model().requires_grad_(False)
        model.load_model_weights(comfy.utils.load_torch_file(str(toy.WEIGHTS / "unet.safetensors")))
        text.load_state_dict(comfy.utils.load_torch_file(str(toy.WEIGHTS / "text_encoder.safetensors")))
        training = train.Training([model.diffusion_model.requires_grad_(True), text], steps, lr=3e-4, decay=0.99)
        stage = train.DiffusionStage("sibling", steps, SIBLING_BATCH, SIBLING_POOL, recoloured)
        train.fit_diffusion(stage, folder, model, text, training)
        train.save(training.averaged().state_dict(), folder / "unet.safetensors")
        (folder / f"trained-{steps}").touch()
    return toy.load_unet(folder / "unet.safetensors")


def _lora(base, tuned) -> dict[str, torch.Tensor]:
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
    Figure("evaluations per step", "evaluations_per_step", 1, 2),
    Figure("prompt accuracy, %", "prompt_accuracy", 100, 1),
    Figure("Fréchet to real", "frechet_to_real", 1, 1),
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


def page(rows: list[dict], sizes, adapter: str, made: str) -> str:
    levels = next((row["by_sigma"] for row in rows if row["setting"] == "omega 3"), [])
    along = ", ".join(f"{sigma:.2f}: {closed:.2f}" for sigma, closed in levels)
    return f"""# Where it was not trained

`python benchmarks/extrapolation.py`, {made}. Written by the command.

The adapter is `{adapter}` of [quality.md](quality.md), trained on the toy with omega up to 6, full captions, 64 x 64
pixels, 15 to 25 steps of the schedulers normal and karras, and the base's own weights. Gaps are on {sizes.gap_captions}
held-out captions, accuracy and Fréchet distance on {sizes.pictures} pictures, at omega 3 and 20 steps where nothing
else is said; errors are over captions and noise.
{_about_sibling(rows)}
Gap closed by noise level at omega 3, on an eighth of the captions: {along or "not measured"}.

{tables_by_section(rows, _columns_for)}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="few pictures, an adapter hardly trained")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    parser.add_argument("--adapter", default="ours_longer", help="a method of quality.py")
    add_work(parser, "quality", what="quality.py's")
    add_results(parser, "extrapolation.md and .json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.experiment import QUICK_SIZES, Sizes, ToyExperiment
    from comfyui_agd.benchmarks.methods import METHODS
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    if args.adapter not in METHODS:
        sys.exit(f"There is no method {args.adapter}; benchmarks/quality.py --list says which there are.")
    sizes, work = QUICK_SIZES if args.quick else Sizes(), WorkFolder(work_path(args, "quality"))
    study = AdapterStudy(ToyExperiment(work, sizes), args.adapter, sibling_steps=2 if args.quick else SIBLING_STEPS)
    kept = WorkFolder(work.folder / f"extrapolation-{args.adapter}")
    for section in args.only:
        study.rows = []
        SECTIONS[section](study)
        kept.save_rows(section, study.rows)
    rows = kept.rows(SECTIONS)
    publish(args, "extrapolation", page(rows, sizes, args.adapter, made_on(args.device)), rows)


if __name__ == "__main__":
    main()

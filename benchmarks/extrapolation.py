"""An adapter where it was not trained: other guidance scales, prompts, sizes, samplers, checkpoints, and LoRAs.

    python benchmarks/extrapolation.py [--quick] [--only SECTION ...] [--work DIR] [--json FILE] [--device cuda]

Takes `quality.py`'s adapter `--adapter` from its work folder, or trains it. Where its error is along the noise levels,
and what each part of it does to pictures, is told too. Writes extrapolation.md and extrapolation.json, which hold every
section that the work folder has of this adapter.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.output import made_on, publish, with_errors

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


class Bench:
    """The adapter with the lab, and how it does somewhere."""

    def __init__(self, lab, name: str, sibling_steps: int):
        from comfyui_agd.agd_core import adapter_file
        from comfyui_agd.benchmarks.methods import METHODS
        from comfyui_agd.examples.toy.measure import omega_star

        self.lab, self.name, self.best, self.sibling_steps = lab, name, omega_star(), sibling_steps
        self.ready, self.cfg = (METHODS[each].make(lab, each) for each in (name, "cfg"))
        self.info, self.adapter = adapter_file.load(self.ready.file)
        self.rows: list[dict] = []

    def add(self, section: str, setting: str, **values) -> None:
        self.rows.append({"model": "toy", "section": section, "setting": setting} | values)
        print(json.dumps(self.rows[-1]), flush=True)

    def patched(self, model, **how):
        from comfyui_agd.agd_core.comfyui.sampling.guided_sampling import apply_adapter

        return apply_adapter(model, self.info, self.adapter.state_dict(), source="the adapter", **how)

    def gap(self, captions: list[str], omega: float, size=(64, 64), model=None, **how) -> dict:
        """Gap closed and cosine, over blocks of captions. `how`: of the teacher's trajectories."""
        from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
        from comfyui_agd.benchmarks import metrics
        from comfyui_agd.benchmarks.lab import CFG, in_blocks
        from comfyui_agd.training.evaluate import evaluate

        own, found = ComfyModel(model or self.lab.parts.model, self.lab.parts.clip), []
        for i, block in enumerate(in_blocks(captions)):
            states = self.lab.follow(block, [omega], CFG, _SEED + i, model=own, size=size, **how)
            with own.denoiser.session():
                found.append(evaluate(own.denoiser, self.adapter.to(own.denoiser.device), states))
        measured = {
            key: metrics.mean_and_error(torch.tensor([getattr(each, key)[omega] for each in found]))
            for key in ("gap_closed", "direction_cosine")
        }
        return with_errors(measured) | {"by_sigma": [[s, round(g, 3)] for s, g in found[0].by_sigma[omega]]}

    def pictures(self, method: str, model, identity: dict, omega: float, steps: int, **how) -> dict:
        """Prompt accuracy and Fréchet distance."""
        from comfyui_agd.benchmarks import metrics
        from comfyui_agd.benchmarks.lab import Ready

        made = self.lab.pictures(method, Ready(model, identity), omega, steps, **how)
        measured = {
            "prompt_accuracy": metrics.mean_and_error(made["correct"]),
            "frechet_to_real": metrics.frechet(made["features"], self.lab.reference["features"]),
        }
        evaluations = made["evaluations"].item() / len(made["correct"]) / steps
        return {"evaluations_per_step": round(evaluations, 2)} | with_errors(measured)


def captions(bench: Bench) -> list[str]:
    from comfyui_agd.examples.toy.sampling import held_out_captions

    return held_out_captions(bench.lab.sizes.gap_captions, _SEED)[1]


def omegas(bench: Bench) -> None:
    for omega in OMEGAS:
        bench.add("Guidance scale", f"omega {omega:g}", **bench.gap(captions(bench), omega))


def prompts(bench: Bench) -> None:
    from comfyui_agd.examples.toy.scenes import draw_scenes, partial_caption

    count, rng = bench.lab.sizes.gap_captions, random.Random(_SEED)
    scenes = draw_scenes(count, _SEED, held=True)
    for name, texts in (
        ("captions of the training", bench.lab.training_captions()[:count]),
        ("new captions", captions(bench)),
        ("new captions that leave things open", [partial_caption(scene, rng) for scene in scenes]),
        ("a shape alone", [f"a {scene.things[0].shape}" for scene in scenes]),
    ):
        bench.add("Prompts", name, **bench.gap(texts, bench.best))


def sizes(bench: Bench) -> None:
    for size in SIZES:
        bench.add("Size", f"{size[0]} x {size[1]} pixels", **bench.gap(captions(bench), bench.best, size))


def schedules(bench: Bench) -> None:
    for scheduler in ("normal", "karras", "simple", "exponential"):
        for steps in (10, 50):
            how = {"scheduler": scheduler, "steps": steps}
            bench.add("Schedule", f"{scheduler}, {steps} steps", **bench.gap(captions(bench), bench.best, **how))


def samplers(bench: Bench) -> None:
    base = bench.lab.parts.model
    ways = [("euler", "normal", steps) for steps in STEP_COUNTS] + [(*names, 20) for names in SAMPLERS]
    for sampler, scheduler, steps in ways:
        usual = (sampler, scheduler) == ("euler", "normal")
        how = {} if usual else {"sampler": sampler, "scheduler": scheduler}
        for method, model, identity in (
            ("cfg", base, bench.cfg.identity),
            (bench.name, bench.ready.model, bench.ready.identity),
        ):
            found = bench.pictures(method, model, identity, bench.best, steps, **how)
            bench.add("Samplers", f"{sampler}, {scheduler}, {steps} steps, {method}", **found)


def noise(bench: Bench) -> None:
    for start, end in PARTS:
        model = bench.patched(bench.lab.parts.model, start_percent=start, end_percent=end)
        identity, name = bench.ready.identity | {"start": start, "end": end}, f"{bench.name}-{start}-{end}"
        found = bench.pictures(name, model, identity, bench.best, 20)
        bench.add("Noise levels", f"the adapter from {start:.0%} to {end:.0%}, else CFG", **found)


def sibling(bench: Bench) -> None:
    """A checkpoint fine-tuned on other colours, and the same change as a LoRA on the base."""
    import comfy.sd

    base, folder = bench.lab.parts.model, bench.lab.work.folder / "sibling"
    tuned = _fine_tuned(folder, bench.sibling_steps)
    lora, changed = _lora(base, tuned), {"sibling": bench.sibling_steps}
    half, full = (comfy.sd.load_lora_for_models(base, None, lora, strength, 0.0)[0] for strength in (0.5, 1.0))
    names = ("base", "sibling", "base with a LoRA of strength 0.5", "base with a LoRA of strength 1")
    for name, model in zip(names, (base, tuned, half, full), strict=True):
        bench.add("Sibling and LoRA", name, **bench.gap(captions(bench), bench.best, model=model))
    # The judge knows the old colours only.
    how, identity = {"shown": coloured_back}, bench.ready.identity | changed
    for name, model, omega in (
        ("sibling-unguided", tuned, 1.0),
        ("sibling-cfg", tuned, bench.best),
        (f"sibling-{bench.name}", bench.patched(tuned), bench.best),
        ("sibling-lora-unguided", full, 1.0),
        ("sibling-lora-cfg", full, bench.best),
        (f"sibling-lora-{bench.name}", bench.patched(full), bench.best),
    ):
        found = bench.pictures(name, model, identity, omega, 20, **how)
        bench.add("Sibling and LoRA", name, **found)


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
        how = {"batch": SIBLING_BATCH, "pool": SIBLING_POOL, "redraw": recoloured}
        train.fit_diffusion("sibling", folder, model, text, training, steps, **how)
        train.save(training.ema[0].state_dict(), folder / "unet.safetensors")
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


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "omegas": omegas,
    "prompts": prompts,
    "sizes": sizes,
    "schedules": schedules,
    "noise": noise,
    "sibling": sibling,
    "samplers": samplers,
}
_COLUMNS = (
    ("gap closed", "gap_closed", 1, 3),
    ("cosine", "direction_cosine", 1, 3),
    ("evaluations per step", "evaluations_per_step", 1, 2),
    ("prompt accuracy, %", "prompt_accuracy", 100, 1),
    ("Fréchet to real", "frechet_to_real", 1, 1),
)


def _of_sibling(rows: list[dict]) -> str:
    if not any(row["section"].startswith("Sibling") for row in rows):
        return ""
    return f"""
The sibling is the base trained for {SIBLING_STEPS} more steps on pictures whose colours are exchanged (red for green,
green for blue, blue for red); its pictures are judged with the colours changed back. The LoRA is the best one of rank
{LORA_RANK} for the same change.
"""


def page(rows: list[dict], sizes, adapter: str, made: str) -> str:
    from comfyui_agd.benchmarks.report import table

    parts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        own = [row for row in rows if row["section"] == section]
        columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in own)]
        parts.append(f"## {section}\n\n{table(own, columns, {'setting': lambda row: row['setting']})}")
    levels = next((row["by_sigma"] for row in rows if row["setting"] == "omega 3"), [])
    along = ", ".join(f"{sigma:.2f}: {closed:.2f}" for sigma, closed in levels)
    text = "\n\n".join(parts)
    return f"""# Where it was not trained

`python benchmarks/extrapolation.py`, {made}. Written by the command.

The adapter is `{adapter}` of [quality.md](quality.md), trained on the toy with omega up to 6, full captions, 64 x 64
pixels, 15 to 25 steps of the schedulers normal and karras, and the base's own weights. Gaps are on {sizes.gap_captions}
held-out captions, accuracy and Fréchet distance on {sizes.pictures} pictures, at omega 3 and 20 steps where nothing
else is said; errors are over captions and noise.
{_of_sibling(rows)}
Gap closed by noise level at omega 3, on an eighth of the captions: {along or "not measured"}.

{text}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    parser.add_argument("--adapter", default="ours_longer", help="a method of quality.py")
    parser.add_argument("--quick", action="store_true", help="few pictures, an adapter hardly trained")
    parser.add_argument("--work", type=Path, help="quality.py's; default: build/quality, or build/quality-quick")
    parser.add_argument("--results", type=Path, help="for extrapolation.md and .json; default: results, unless quick")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks import lab
    from comfyui_agd.benchmarks.methods import METHODS

    if args.adapter not in METHODS:
        sys.exit(f"There is no method {args.adapter}; benchmarks/quality.py --list says which there are.")
    sizes = lab.QUICK if args.quick else lab.Sizes()
    work = lab.Work(args.work or Path("build") / ("quality-quick" if args.quick else "quality"))
    bench = Bench(lab.Lab(work, sizes), args.adapter, sibling_steps=2 if args.quick else SIBLING_STEPS)
    kept = lab.Work(work.folder / f"extrapolation-{args.adapter}")
    for section in args.only:
        bench.rows = []
        SECTIONS[section](bench)
        kept.save_rows(section, bench.rows)
    rows = kept.rows(SECTIONS)
    publish(args, "extrapolation", page(rows, sizes, args.adapter, made_on(args.device)), rows)


if __name__ == "__main__":
    main()

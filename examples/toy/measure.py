"""Measures the committed toy and writes its model card: `python -m comfyui_agd.examples.toy measure`.

The toy's best guidance scale, omega*, is the one with the highest prompt accuracy of CFG on held-out captions.
"""

import argparse
import json

from . import model as toy
from .picture import comparison
from .sampling import SAMPLER, SCHEDULER, STEPS, SamplerSettings, Toy, encode, held_out_captions, sample
from .scoring import Scorer
from .tables import Column, markdown_table

OMEGAS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
MEASURED = toy.WEIGHTS / "measured.json"
CARD = toy.WEIGHTS.parent / "MODEL_CARD.md"
_CAPTIONS_SEED, _NOISE_SEED = 23, 1000


def omega_star() -> float:
    """The toy's best guidance scale, as last measured."""
    return json.loads(MEASURED.read_text())["omega_star"]


_FILES = (
    Column("file", lambda path: path.name),
    Column("size", lambda path: f"{path.stat().st_size / 1e6:.2f} MB"),
)
_CURVE = (
    Column("omega", lambda point: point[0]),
    Column("prompt accuracy", lambda point: f"{100 * point[1]['prompt_accuracy']:.1f} %"),
    Column("Fréchet distance", lambda point: f"{point[1]['frechet_to_real']:.2f}"),
)


def _losses(stage: dict) -> str:
    return ", ".join(f"{step}: {value}" for step, value in list(stage["loss"].items())[::2])


def _card(measured: dict, training: dict) -> str:
    judge = training["judge"]
    each = ", ".join(f"{name} {100 * value:.1f} %" for name, value in judge["held_out_accuracy_each"].items())
    return f"""# Model card: the AGD toy

A text-to-image model of coloured shapes on 64x64 pixels, made by this repository's own code from drawings that code
makes (`scenes.py`). It is the embedded default of the demo and the tests. This page is written by `measure.py`.
What is found on this base is about this base: a second one bears out some of it, not all
([quality.md](../../docs/quality.md#on-a-second-base)).

{markdown_table(_FILES, sorted(toy.WEIGHTS.glob("*.safetensors")))}

- **Diffusion model**: ComfyUI's `UNetModel`, 64/128 channels, cross-attention with linear projections at every level
  (7 layers), SD's noise schedule, eps-prediction, 8x8x{toy.LATENT_CHANNELS} latents. {training["base"]["steps"]} steps
  of batch 64, AdamW 1e-3 with warm-up and half a cosine (trained to its end it would hardly need guidance), EMA
  0.9995, 12 % of the captions dropped, bf16 autocast, seed 2503, {training["base"]["seconds"]} s; then
  {training["cooldown"]["steps"]} steps from 3e-4 to 0, EMA 0.99, {training["cooldown"]["seconds"]} s.
  Loss by step: {_losses(training["base"])}; cooldown: {_losses(training["cooldown"])}.
- **Text encoder**: CLIP's text model, 2 layers of 128 channels over {len(toy.VOCABULARY)} words, trained with the
  diffusion model. Unknown words are an error.
- **Autoencoder**: {training["vae"]["steps"]} steps of batch 32, {training["vae"]["seconds"]} s; PSNR on held-out
  pictures {training["vae"]["psnr_held_out_db"]} dB.
- **Judge**: {judge["steps"]} steps of batch 64, {judge["seconds"]} s. On 4,000 held-out pictures *all* attributes are
  right in {100 * judge["held_out_accuracy_all_attributes"]:.2f} % (after the autoencoder:
  {100 * judge["held_out_accuracy_all_attributes_through_vae"]:.2f} %); each alone: {each}.

## Guidance matters

Classifier-free guidance over {measured["captions"]} held-out captions, {SAMPLER}/{SCHEDULER}, {STEPS} steps, through
ComfyUI's KSampler. Prompt accuracy counts a picture only if every attribute of its caption is right. Fréchet distance
is to {measured["reference_images"]} real held-out pictures in the judge's features.

{markdown_table(_CURVE, measured["curve"].items())}

**omega* = {measured["omega_star"]:g}**: {100 * measured["lead"]:.1f} points above unguided (omega 1).
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--sheet", help="also write a contact sheet of the first captions to this file")
    args = parser.parse_args(argv)
    parts, scorer, curve, rows = Toy.load(), Scorer(), {}, []
    scenes, captions = held_out_captions(args.captions, _CAPTIONS_SEED)
    prompts = encode(parts.clip, captions)
    for omega in OMEGAS:
        images = sample(parts, parts.model, prompts, SamplerSettings(omega, _NOISE_SEED)).images
        accuracy, distance = scorer.accuracy(images, scenes), scorer.frechet(images)
        curve[f"{omega:g}"] = {"prompt_accuracy": round(accuracy, 4), "frechet_to_real": round(distance, 3)}
        rows.append((f"omega {omega:g}", images[:10]))
        print(f"omega {omega:4g}: prompt accuracy {accuracy:.4f}, Fréchet distance {distance:.3f}", flush=True)
    best = max(curve, key=lambda omega: curve[omega]["prompt_accuracy"])
    measured = {
        "omega_star": float(best),
        "lead": round(curve[best]["prompt_accuracy"] - curve["1"]["prompt_accuracy"], 4),
        "captions": args.captions,
        "reference_images": len(scorer.reference),
        "curve": curve,
    }
    MEASURED.write_text(json.dumps(measured, indent=2) + "\n")
    CARD.write_text(_card(measured, json.loads((toy.WEIGHTS / "training_log.json").read_text())))
    if args.sheet:
        comparison(rows).save(args.sheet)
    print(f"omega* = {best}; wrote {CARD.name} and {MEASURED.name}")

"""Measures a committed toy and writes the model card: `python -m comfyui_agd.examples.toy measure --model toy-dit`.

Its best guidance scale, omega*, is the one with the highest prompt accuracy of CFG on held-out captions.
"""

import argparse
import json

from . import model as toy
from .bases import BASES, Base
from .picture import comparison
from .sampling import SAMPLER, STEPS, Toy, encode, held_out_captions, sample
from .scoring import Scorer
from .standard_errors import share_error
from .tables import Column, markdown_table

OMEGAS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
CARD = toy.WEIGHTS.parent / "MODEL_CARD.md"
_CAPTIONS_SEED, _NOISE_SEED = 23, 1000


def omega_star(name: str = "toy") -> float:
    """The base's best guidance scale, as last measured."""
    return json.loads(BASES[name].measured.read_text())["omega_star"]


_FILES = (
    Column("file", lambda path: path.name),
    Column("size", lambda path: f"{path.stat().st_size / 1e6:.2f} MB"),
)
_CURVE = (
    Column("omega", lambda point: f"{point['omega']:g}"),
    Column("steps", lambda point: str(point["steps"])),
    Column(
        "prompt accuracy (SE)",
        lambda point: f"{100 * point['prompt_accuracy']:.1f} % ({100 * point['prompt_accuracy_se']:.1f})",
    ),
    Column("Fréchet distance", lambda point: f"{point['frechet_to_real']:.2f}"),
)


def _losses(stage: dict) -> str:
    return ", ".join(f"{step}: {value}" for step, value in list(stage["loss"].items())[::2])


def _guidance_section(base: Base) -> str:
    measured = json.loads(base.measured.read_text())
    best, unguided = (_point(measured, omega)["prompt_accuracy"] for omega in (measured["omega_star"], 1.0))
    return f"""### {base.name}

{SAMPLER}/{base.scheduler}. **omega* = {measured["omega_star"]:g}**: {100 * (best - unguided):.1f} points above unguided
(omega 1).

{markdown_table(_CURVE, measured["curve"])}
"""


def _point(measured: dict, omega: float) -> dict:
    """Of the curve, at the usual number of steps."""
    return next(point for point in measured["curve"] if (point["omega"], point["steps"]) == (omega, STEPS))


def _card(training: dict) -> str:
    judge, measured = training["judge"], [base for base in BASES.values() if base.measured.exists()]
    each = ", ".join(f"{name} {100 * value:.1f} %" for name, value in judge["held_out_accuracy_each"].items())
    curves, like = "\n".join(map(_guidance_section, measured)), json.loads(measured[0].measured.read_text())
    return f"""# Model card: the AGD toys

Two text-to-image models of coloured shapes on 64x64 pixels, made by this repository's own code from drawings that code
makes (`scenes.py`). *toy*, a UNet, is the embedded default of the demo and the tests; *toy-dit* is a transformer beside
it, with the same text encoder and autoencoder. This page is written by `measure.py`.
What is found on these bases is about these bases: another one bears out some of it, not all
([quality.md](../../docs/quality.md#on-a-second-base)).

{markdown_table(_FILES, sorted(toy.WEIGHTS.glob("*.safetensors")))}

- **Diffusion model of toy**: ComfyUI's `UNetModel`, 64/128 channels, cross-attention with linear projections at every
  level (7 layers), SD's noise schedule, eps-prediction, 8x8x{toy.LATENT_CHANNELS} latents. {training["base"]["steps"]}
  steps of batch 64, AdamW 1e-3 with warm-up and half a cosine (trained to its end it would hardly need guidance), EMA
  0.9995, 12 % of the captions dropped, bf16 autocast, seed 2503, {training["base"]["seconds"]} s; then
  {training["cooldown"]["steps"]} steps from 3e-4 to 0, EMA 0.99, {training["cooldown"]["seconds"]} s.
  Loss by step: {_losses(training["base"])}; cooldown: {_losses(training["cooldown"])}.
{_dit(training["dit"])}
- **Text encoder**: CLIP's text model, 2 layers of 128 channels over {len(toy.VOCABULARY)} words, trained with toy's
  diffusion model. Unknown words are an error.
- **Autoencoder**: {training["vae"]["steps"]} steps of batch 32, {training["vae"]["seconds"]} s; PSNR on held-out
  pictures {training["vae"]["psnr_held_out_db"]} dB.
- **Judge**: {judge["steps"]} steps of batch 64, {judge["seconds"]} s. On 4,000 held-out pictures *all* attributes are
  right in {100 * judge["held_out_accuracy_all_attributes"]:.2f} % (after the autoencoder:
  {100 * judge["held_out_accuracy_all_attributes_through_vae"]:.2f} %); each alone: {each}.

## Guidance matters

Classifier-free guidance over {like["captions"]} held-out captions, through ComfyUI's KSampler. Prompt accuracy counts a
picture only if every attribute of its caption is right. Fréchet distance is to {like["reference_images"]} real held-out
pictures in the judge's features.

{curves}"""


def _dit(training: dict) -> str:
    return f"""- **Diffusion model of toy-dit**: ComfyUI's `OpenAISignatureMMDITWrapper` in the configuration of SD3,
  six joint blocks of 128 channels (two heads, RMS-normalised queries and keys) over 16 image tokens and
  {toy.MAX_TOKENS} of text, rectified flow (shift 1), the same latents. {training["steps"]} steps of batch 64 at
  logit-normal noise levels, AdamW 2e-3 with warm-up and the first part of a cosine, EMA 0.999, 12 % of the captions
  dropped, bf16 autocast, seed 2503, {training["seconds"]} s. Loss by step: {_losses(training)}."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(BASES), default="toy")
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--sheet", help="also write a contact sheet of the first captions to this file")
    args = parser.parse_args(argv)
    parts, scorer, curve, rows = Toy.load(args.model), Scorer(), [], []
    scenes, captions = held_out_captions(args.captions, _CAPTIONS_SEED)
    prompts = encode(parts.clip, captions)

    def measure(omega: float, steps: int) -> None:
        images = sample(parts, parts.model, prompts, parts.settings(omega, _NOISE_SEED, steps)).images
        accuracy, distance = scorer.accuracy(images, scenes), scorer.frechet(images)
        error = share_error(accuracy, len(images))
        point = {"omega": omega, "steps": steps, "prompt_accuracy": round(accuracy, 4)}
        curve.append(point | {"prompt_accuracy_se": round(error, 4), "frechet_to_real": round(distance, 3)})
        rows.append((f"omega {omega:g}, {steps}", images[:10]))
        found = f"prompt accuracy {accuracy:.4f} ({error:.4f}), Fréchet distance {distance:.3f}"
        print(f"omega {omega:3g}, {steps} steps: {found}", flush=True)

    for omega in OMEGAS:
        measure(omega, STEPS)
    best = max(curve, key=lambda point: point["prompt_accuracy"])["omega"]
    measure(best, STEPS // 2)
    measured = {
        "omega_star": best,
        "captions": args.captions,
        "reference_images": len(scorer.reference),
        "curve": curve,
    }
    parts.base.measured.write_text(json.dumps(measured, indent=2) + "\n")
    CARD.write_text(_card(json.loads((toy.WEIGHTS / "training_log.json").read_text())))
    if args.sheet:
        comparison(rows).save(args.sheet)
    print(f"omega* = {best:g}; wrote {CARD.name} and {parts.base.measured.name}")

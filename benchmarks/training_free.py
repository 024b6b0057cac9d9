"""Guidance in one evaluation with nothing trained: which form of it is worth most on the toy.

    python benchmarks/training_free.py [--quick] [--only FORM ...] [--work DIR] [--json FILE] [--device cuda]

Forms of `attention + (omega - 1) * s * delta`: s constant, by depth, by noise level, and normalised as in NAG; and
prompt and negative in turn, with several samplers; beside the base without guidance and with CFG. Pictures are those of
`quality.py`, from the same work folder, where they are kept. Writes training_free.md and training_free.json, which hold
every form that the work folder has rows of.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.output import made_on, publish, with_errors

# s at the `KNOTS` of kinds/scale.py, from the least noise to the most.
Knots = tuple[float, float, float, float]
_NONE: Knots = (0.0, 0.0, 0.0, 0.0)
_OUTER, _DEEP = 64, 128  # widths of the toy's adapter layers; the middle of the UNet is as wide as the deep ones


def _even(s: float) -> Knots:
    return (s, s, s, s)


@dataclass(frozen=True)
class Scales:
    """s of the outer layers, the deep ones, and the middle of the UNet."""

    outer: Knots
    deep: Knots
    middle: Knots = _NONE

    def of(self, layer) -> Knots:
        if layer.innermost:
            return self.middle
        return {_OUTER: self.outer, _DEEP: self.deep}[layer.width]


@dataclass(frozen=True)
class Normalised:
    """NAG's tau and alpha."""

    tau: float
    alpha: float


def _both(knots: Knots) -> Scales:
    return Scales(knots, knots)


FORMS: dict[str, dict[str, Scales | Normalised]] = {
    "Constant, none in the middle of the UNet": {f"s = {s:g}": _both(_even(s)) for s in (0.2, 0.35, 0.5, 0.75, 1.0)},
    "By depth": {
        "s = 0.35 everywhere": Scales(_even(0.35), _even(0.35), _even(0.35)),
        "s = 0.35 at the outer sites only": Scales(_even(0.35), _NONE),
        "s = 0.35 at the deep sites only": Scales(_NONE, _even(0.35)),
        "s = 0.7 outer, 0.35 deep": Scales(_even(0.7), _even(0.35)),
        "s = 0.35 outer, 0.7 deep": Scales(_even(0.35), _even(0.7)),
    },
    "By noise level": {
        "s falls with the noise, 0.6 to 0": _both((0.6, 0.4, 0.2, 0.0)),
        "s rises with the noise, 0 to 0.6": _both((0.0, 0.2, 0.4, 0.6)),
        "s = 0.5 in the middle of the noise, 0 at its ends": _both((0.0, 0.5, 0.5, 0.0)),
        "s = 0.2 in the middle of the noise, 0.5 at its ends": _both((0.5, 0.2, 0.2, 0.5)),
    },
    "Normalised as in NAG": {
        "tau 2.5, alpha 0.25, as published": Normalised(2.5, 0.25),
        "tau 2.5, alpha 0.5": Normalised(2.5, 0.5),
        "tau 1.5, alpha 0.5": Normalised(1.5, 0.5),
    },
}


# Sampler, scheduler and steps with which prompt and negative take turns, and CFG has both.
IN_TURN = (
    *(("euler", "normal", steps) for steps in (20, 10)),
    ("euler_ancestral", "normal", 20),
    ("dpmpp_2m", "karras", 20),
    ("dpmpp_2m_sde", "karras", 20),
    ("dpmpp_3m_sde", "exponential", 20),
    ("lcm", "normal", 20),
    *(("euler", "normal", steps) for steps in (6, 3)),
)


@dataclass(frozen=True)
class Case:
    """`make()` gives the MODEL; `how`: another sampler and scheduler than the usual ones."""

    make: Callable
    omega: float
    steps: int
    how: dict[str, str] = field(default_factory=dict)


def patched(lab, form: Scales | Normalised):
    """The toy's MODEL, guided in that form."""
    from comfyui_agd.agd_core.attention_guidance import attention_guidance
    from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
    from comfyui_agd.benchmarks import baselines

    model, base = lab.parts.model, lab.host().base
    if isinstance(form, Normalised):
        return baselines.normalised(model, base, form.tau, form.alpha)
    info, state = attention_guidance(base)
    scales = [torch.tensor(form.of(layer)).expand(layer.width, -1) for layer in base.layers]
    return apply_adapter(model, info, state | {"kind.to_scale.weight": torch.cat(scales)}, source="a form of it")


def cases_of(lab) -> dict[tuple[str, str], Case]:
    """By section and name."""
    from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free
    from comfyui_agd.examples.toy.measure import omega_star
    from comfyui_agd.examples.toy.sampling import STEPS

    base, best, plain = lab.parts.model, omega_star(), "Without and with a second pass"
    cases = {(plain, "unguided"): Case(lambda: base, 1.0, STEPS), (plain, "CFG"): Case(lambda: base, best, STEPS)}
    for section, forms in FORMS.items():
        cases |= {
            (section, name): Case(lambda form=form: patched(lab, form), best, STEPS) for name, form in forms.items()
        }
    for sampler, scheduler, steps in IN_TURN:
        how = {"sampler": sampler, "scheduler": scheduler}
        for name, make in (("in turn", lambda: apply_training_free(base)), ("CFG", lambda: base)):
            named = f"{sampler}, {scheduler}, {steps} steps: {name}"
            cases["Prompt and negative in turn", named] = Case(make, best, steps, how)
    return cases


def measure(lab, name: str, case: Case, identity: dict) -> dict:
    """Accuracy and Fréchet distance, and the accuracy above the base's without guidance as a share of CFG's lead."""
    from comfyui_agd.benchmarks import metrics
    from comfyui_agd.benchmarks.lab import Ready
    from comfyui_agd.benchmarks.methods import METHODS
    from comfyui_agd.examples.toy.measure import omega_star
    from comfyui_agd.examples.toy.sampling import STEPS

    made = lab.pictures(name, Ready(case.make(), identity), case.omega, case.steps, **case.how)
    unguided, cfg = (
        lab.pictures(each, METHODS[each].make(lab, each), scale, STEPS)
        for each, scale in (("unguided", 1.0), ("cfg", omega_star()))
    )
    lead = (cfg["correct"].double() - unguided["correct"].double()).mean()
    measured = {
        "prompt_accuracy": metrics.mean_and_error(made["correct"]),
        "share_of_lead": metrics.mean_and_error((made["correct"].double() - unguided["correct"].double()) / lead),
        "frechet_to_real": metrics.frechet(made["features"], lab.reference["features"]),
    }
    evaluations = made["evaluations"].item() / len(made["correct"]) / case.steps
    row = {"evaluations_per_step": round(evaluations, 2), "omega": case.omega, "steps": case.steps}
    return row | with_errors(measured)


def page(rows: list[dict], pictures: int, made: str) -> str:
    from comfyui_agd.benchmarks.report import table

    columns = [
        ("evaluations per step", "evaluations_per_step", 1, 2),
        ("prompt accuracy, %", "prompt_accuracy", 100, 1),
        ("share of CFG's lead", "share_of_lead", 1, 2),
        ("Fréchet to real", "frechet_to_real", 1, 1),
    ]
    parts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        own = [row for row in rows if row["section"] == section]
        parts.append(f"## {section}\n\n{table(own, columns, {'form': lambda row: row['form']})}")
    text = "\n\n".join(parts)
    return f"""# Training-free guidance: which form

`python benchmarks/training_free.py`, {made}. Written by the command.

At omega 3 and, unless a line says otherwise, 20 steps of Euler, on {pictures} pictures of [quality.md](quality.md)'s
captions; each value with its standard error. CFG's lead is that of its 20 Euler steps. Most forms are
`attention + (omega - 1) * s * delta` at every cross-attention of the toy; the constant of the loader's
`attention-guidance`, s = 0.35 without the middle of the UNet, was chosen on other captions. The loader's
`training-free` is the last section: what ComfyUI's samplers do with prompt and negative in turn. At equal evaluations
compare its 20 steps with CFG's 10; more of that is in quality.md. All of this is of one base, the toy.

{text}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FORM", help="those whose section or name have one of these")
    parser.add_argument("--quick", action="store_true", help="a few forms, few pictures: shows that it runs")
    parser.add_argument("--work", type=Path, help="quality.py's; default: build/quality, or build/quality-quick")
    parser.add_argument("--results", type=Path, help="for training_free.md and .json; default: results, unless quick")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks import lab

    sizes = lab.QUICK if args.quick else lab.Sizes()
    own = lab.Lab(lab.Work(args.work or Path("build") / ("quality-quick" if args.quick else "quality")), sizes)
    kept = lab.Work(own.work.folder / "training-free")
    cases = cases_of(own)
    asked = args.only or (["second pass", "NAG", "euler, normal, 20"] if args.quick else [""])
    chosen = [case for case in cases if any(each.lower() in " ".join(case).lower() for each in asked)]
    if not chosen:
        sys.exit(f"No form has {' or '.join(asked)} in its name or section.")
    file_of = {case: f"{i:02d}" for i, case in enumerate(cases)}
    for section, name in chosen:
        stem, identity = f"training-free-{file_of[section, name]}", {"form": name, "section": section}
        row = {"model": "toy", **identity} | measure(own, stem, cases[section, name], identity)
        kept.save_rows(file_of[section, name], [row])
        print(f"{section}: {name}: {row['prompt_accuracy']:.4f}", flush=True)
    rows = kept.rows()
    publish(args, "training_free", page(rows, sizes.pictures, made_on(args.device)), rows)


if __name__ == "__main__":
    main()

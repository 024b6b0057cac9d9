"""Guidance without training: which form of it is worth most on the toys.

    python benchmarks/training_free.py [--base toy-dit] [--quick] [--only FORM ...] [--work DIR] [--json FILE]
    [--device cuda]

CFG of which steps are forecast, as the loader's `training-free` does it, with several samplers, beside CFG with as
many steps and with as many evaluations. On the UNet also guidance in one evaluation, forms of
`attention + (omega - 1) * s * delta`: s constant, by depth, by noise level, and normalised as in NAG. Pictures are
those of `quality.py`, from the same work folder, where they are kept. Writes training_free.md, or
training_free-toy-dit.md, and .json, which hold every form that the work folder has rows of.
"""

import argparse
import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import (
    add_results,
    add_toys,
    add_work,
    benchmark_parser,
    matching,
    named_for,
    selected,
    work_path,
)
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import Figure, columns_of, publish_page, tables_by_section, with_errors, write_rows
from comfyui_agd.examples.toy.tables import Column

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


# Sampler, scheduler and steps, of first and second order and with noise, of which steps are forecast.
FORECAST = {
    "toy": (
        *(("euler", "normal", steps) for steps in (20, 10)),
        ("dpmpp_2m", "karras", 20),
        ("euler_ancestral", "normal", 20),
    ),
    "toy-dit": (
        *(("euler", "simple", steps) for steps in (20, 10)),
        ("dpmpp_2m", "simple", 20),
        ("euler_ancestral", "simple", 20),
    ),
}


@dataclass(frozen=True)
class Form:
    """A form of guidance: `make()` gives the MODEL, `at()` says how it is sampled, a `SampledAt`."""

    section: str
    name: str
    make: Callable
    at: Callable

    @property
    def identity(self) -> dict[str, str]:
        return {"form": self.name, "section": self.section}


def patched(experiment, form: Scales | Normalised):
    """The toy's MODEL, guided in that form."""
    from comfyui_agd.agd_core.attention_guidance import attention_guidance
    from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
    from comfyui_agd.benchmarks import baselines

    model, base = experiment.parts.model, experiment.model().base
    if isinstance(form, Normalised):
        return baselines.normalised(model, base, form.tau, form.alpha)
    info, weights = attention_guidance(base)
    scales = [torch.tensor(form.of(layer)).expand(layer.width, -1) for layer in base.layers]
    return apply_adapter(model, info, weights | {"kind.to_scale.weight": torch.cat(scales)}, source="a form of it")


def forms_of(experiment) -> list[Form]:
    """In the order of the tables."""
    from comfyui_agd.benchmarks.experiment import SampledAt

    base, best, plain = experiment.parts.model, SampledAt(experiment.best_omega), "Without and with a second pass"
    found = [
        Form(plain, "unguided", lambda: base, lambda: SampledAt(1.0)),
        Form(plain, "CFG", lambda: base, lambda: best),
    ]
    for section, forms in FORMS.items() if experiment.base.name == "toy" else ():
        for name, form in forms.items():
            found.append(Form(section, name, lambda form=form: patched(experiment, form), lambda: best))
    for sampler, scheduler, steps in FORECAST[experiment.base.name]:
        found += forecast_forms(experiment, SampledAt(experiment.best_omega, steps, sampler, scheduler))
    return found


def forecast_forms(experiment, at) -> list[Form]:
    """CFG of which steps are forecast, and plain CFG with as many steps and with as many evaluations or one more."""
    from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free

    base, section = experiment.parts.model, "Steps that are forecast"
    name = f"{at.sampler}, {at.scheduler}, {at.steps} steps"
    forecast = Form(section, f"{name}: training-free", lambda: apply_training_free(base), lambda: at)

    def equal():
        evaluations = pictures_of(experiment, forecast).evaluations_per_step(1)
        return replace(at, steps=math.ceil(evaluations / 2))

    cfg = Form(section, f"{name}: CFG", lambda: base, lambda: at)
    return [forecast, cfg, Form(section, f"{name}: CFG, as many evaluations", lambda: base, equal)]


def pictures_of(experiment, form: Form):
    """Its `Samples`. Plain CFG's are those of every other benchmark."""
    from comfyui_agd.benchmarks.experiment import PreparedMethod

    name = "training-free-" + hashlib.sha256(f"{form.section} {form.name}".encode()).hexdigest()[:8]
    return experiment.samples(name, PreparedMethod(form.make(), form.identity), form.at())


def measure(experiment, form: Form) -> dict:
    """Accuracy and Fréchet distance, the accuracy above the base's without guidance as a share of CFG's lead, and how
    far its pictures are from CFG's own, where that can be said."""
    from comfyui_agd.benchmarks import metrics
    from comfyui_agd.benchmarks.experiment import SampledAt
    from comfyui_agd.benchmarks.methods import METHODS

    made, at = pictures_of(experiment, form), form.at()
    unguided, cfg = (
        experiment.samples(each, METHODS[each].prepare(experiment, each), SampledAt(omega)).correct.double()
        for each, omega in (("unguided", 1.0), ("cfg", experiment.best_omega))
    )
    share = (made.correct.double() - unguided) / (cfg - unguided).mean()
    measured = experiment.accuracy_and_distance(made) | {"share_of_lead": metrics.mean_and_error(share)}
    if at.omega != 1:
        measured["distance_to_cfg"] = experiment.distance_to_cfg(made, at)
    row = {"model": experiment.base.name, **form.identity, "omega": at.omega, "steps": at.steps}
    row["evaluations_per_step"] = round(made.evaluations_per_step(at.steps), 2)
    row["evaluations"] = round(made.evaluations_per_step(1), 1)
    return row | {"pictures": len(made.correct)} | with_errors(measured)


def page(rows: list[dict], experiment, made: str) -> str:
    base = experiment.base
    figures = (
        Figure("pictures", "pictures", 1, 0),
        Figure("evaluations per step", "evaluations_per_step", 1, 2),
        Figure("per picture", "evaluations", 1, 0),
        Figure("prompt accuracy, %", "prompt_accuracy", 100, 1),
        Figure("share of CFG's lead", "share_of_lead", 1, 2),
        Figure("Fréchet to real", "frechet_to_real", 1, 1),
        Figure("distance to CFG's picture", "distance_to_cfg", 1, 3),
    )
    columns = [Column("form", lambda row: row["form"]), *columns_of(figures)]
    return f"""# Training-free guidance on {base.title}: which form

`python benchmarks/training_free.py --base {base.name}`, {made}. Written by the command.

At omega {experiment.best_omega:g}, the best, and, unless a line says otherwise, 20 steps of Euler, on
[quality.md](quality.md)'s captions; each value with its standard error. CFG's lead is that of its 20 Euler steps. The
distance is that of final latents to CFG's at 50 steps of the same sampler, 1 being as far as the unguided ones; with a
sampler that adds noise there is none. "Steps that are forecast" is the loader's `training-free`; "as many evaluations"
is plain CFG with half as many steps, rounded up. Forms in the attention, on the UNet only, are
`attention + (omega - 1) * s * delta` at every cross-attention; the constant of the loader's `attention-guidance`,
s = 0.35 without the middle of the UNet, was chosen on other captions.

{tables_by_section(rows, lambda own: columns)}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="a few forms, few pictures: shows that it runs")
    add_toys(parser)
    parser.add_argument("--only", nargs="+", metavar="FORM", help="those whose section or name have one of these")
    parser.add_argument("--pictures", type=int, help="how many for each form, in place of quality.py's")
    add_work(parser, "quality", what="quality.py's")
    add_results(parser, "the page and its .json")
    return parser.parse_args(argv)


def measure_base(experiment, forms: list[Form], chosen: list[int]) -> list[dict]:
    """Measure the chosen forms, into the work folder. Returns the rows of all that are there."""
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    kept = WorkFolder(experiment.work.folder / "training-free")
    for i in chosen:
        row = measure(experiment, forms[i])
        kept.save_rows(f"{i:02d}", [row])
        print(f"{forms[i].section}: {forms[i].name}: {row['prompt_accuracy']:.4f}", flush=True)
    return kept.rows()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.experiment import QUICK_SIZES, Sizes, ToyExperiment
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    sizes = QUICK_SIZES if args.quick else Sizes()
    sizes = replace(sizes, pictures=args.pictures or sizes.pictures)
    experiments = [ToyExperiment(WorkFolder(work_path(args, "quality", base)), sizes, base) for base in args.base]
    asked = args.only or (["second pass", "NAG", "20 steps: training-free"] if args.quick else [""])
    forms = [forms_of(experiment) for experiment in experiments]
    names = [[f"{form.section} {form.name}" for form in own] for own in forms]
    selected(list(itertools.chain(*names)), asked, "form")
    rows: list[dict] = []
    for experiment, own, named in zip(experiments, forms, names, strict=True):
        found = measure_base(experiment, own, matching(named, asked))
        rows += found
        text = page(found, experiment, made_on(args.device))
        publish_page(args, named_for("training_free", experiment.base.name), text, found)
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()

"""Guidance in one evaluation with nothing trained: which form of it is worth most on the toy.

    python benchmarks/training_free.py [--quick] [--only FORM ...] [--work DIR] [--json FILE] [--device cuda]

Forms of `attention + (omega - 1) * s * delta`: s constant, by depth, by noise level, and normalised as in NAG; and
prompt and negative in turn, with several samplers; beside the base without guidance and with CFG. Pictures are those of
`quality.py`, from the same work folder, where they are kept. Writes training_free.md and training_free.json, which hold
every form that the work folder has rows of.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_results, add_work, benchmark_parser, selected, work_path
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import Figure, columns_of, publish, tables_by_section, with_errors
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
class Form:
    """A form of guidance: `make()` gives the MODEL, `at` (a `SampledAt`) is how it is sampled."""

    section: str
    name: str
    make: Callable
    at: object

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
    from comfyui_agd.examples.toy.measure import omega_star

    base, best, plain = experiment.parts.model, SampledAt(omega_star()), "Without and with a second pass"
    found = [Form(plain, "unguided", lambda: base, SampledAt(1.0)), Form(plain, "CFG", lambda: base, best)]
    for section, forms in FORMS.items():
        for name, form in forms.items():
            found.append(Form(section, name, lambda form=form: patched(experiment, form), best))
    return found + forms_in_turn(base)


def forms_in_turn(base) -> list[Form]:
    from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free
    from comfyui_agd.benchmarks.experiment import SampledAt
    from comfyui_agd.examples.toy.measure import omega_star

    found = []
    for sampler, scheduler, steps in IN_TURN:
        at = SampledAt(omega_star(), steps, sampler, scheduler)
        for name, make in (("in turn", lambda: apply_training_free(base)), ("CFG", lambda: base)):
            full_name = f"{sampler}, {scheduler}, {steps} steps: {name}"
            found.append(Form("Prompt and negative in turn", full_name, make, at))
    return found


def measure(experiment, name: str, form: Form) -> dict:
    """Accuracy and Fréchet distance, and the accuracy above the base's without guidance as a share of CFG's lead."""
    from comfyui_agd.benchmarks import metrics
    from comfyui_agd.benchmarks.experiment import PreparedMethod, SampledAt
    from comfyui_agd.benchmarks.methods import METHODS
    from comfyui_agd.examples.toy.measure import omega_star

    made = experiment.samples(name, PreparedMethod(form.make(), form.identity), form.at)
    unguided, cfg = (
        experiment.samples(each, METHODS[each].prepare(experiment, each), SampledAt(omega)).correct.double()
        for each, omega in (("unguided", 1.0), ("cfg", omega_star()))
    )
    share = (made.correct.double() - unguided) / (cfg - unguided).mean()
    row = {"evaluations_per_step": round(made.evaluations_per_step(form.at.steps), 2)}
    row |= {"omega": form.at.omega, "steps": form.at.steps}
    measured = experiment.accuracy_and_distance(made) | {"share_of_lead": metrics.mean_and_error(share)}
    return {"model": "toy", **form.identity} | row | with_errors(measured)


def page(rows: list[dict], pictures: int, made: str) -> str:
    figures = (
        Figure("evaluations per step", "evaluations_per_step", 1, 2),
        Figure("prompt accuracy, %", "prompt_accuracy", 100, 1),
        Figure("share of CFG's lead", "share_of_lead", 1, 2),
        Figure("Fréchet to real", "frechet_to_real", 1, 1),
    )
    columns = [Column("form", lambda row: row["form"]), *columns_of(figures)]
    return f"""# Training-free guidance: which form

`python benchmarks/training_free.py`, {made}. Written by the command.

At omega 3 and, unless a line says otherwise, 20 steps of Euler, on {pictures} pictures of [quality.md](quality.md)'s
captions; each value with its standard error. CFG's lead is that of its 20 Euler steps. Most forms are
`attention + (omega - 1) * s * delta` at every cross-attention of the toy; the constant of the loader's
`attention-guidance`, s = 0.35 without the middle of the UNet, was chosen on other captions. The loader's
`training-free` is the last section: what ComfyUI's samplers do with prompt and negative in turn. At equal evaluations
compare its 20 steps with CFG's 10; more of that is in quality.md. All of this is of one base, the toy.

{tables_by_section(rows, lambda own: columns)}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="a few forms, few pictures: shows that it runs")
    parser.add_argument("--only", nargs="+", metavar="FORM", help="those whose section or name have one of these")
    add_work(parser, "quality", what="quality.py's")
    add_results(parser, "training_free.md and .json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.experiment import QUICK_SIZES, Sizes, ToyExperiment
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    experiment = ToyExperiment(WorkFolder(work_path(args, "quality")), QUICK_SIZES if args.quick else Sizes())
    kept = WorkFolder(experiment.work.folder / "training-free")
    forms = forms_of(experiment)
    asked = args.only or (["second pass", "NAG", "euler, normal, 20"] if args.quick else [""])
    for i in selected([f"{form.section} {form.name}" for form in forms], asked, "form"):
        row = measure(experiment, f"training-free-{i:02d}", forms[i])
        kept.save_rows(f"{i:02d}", [row])
        print(f"{forms[i].section}: {forms[i].name}: {row['prompt_accuracy']:.4f}", flush=True)
    rows = kept.rows()
    publish(args, "training_free", page(rows, experiment.sizes.pictures, made_on(args.device)), rows)


if __name__ == "__main__":
    main()

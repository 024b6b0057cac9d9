"""How good guidance in one pass is on the toys, beside what else there is: every method in one table.

    python benchmarks/quality.py [--base toy|toy-dit ...] [--quick] [--only METHOD ...] [--trainings N | --seed N]
                                 [--work DIR] [--json FILE] [--device cuda]

Trains what has to be trained, samples through ComfyUI's KSampler, and writes quality.md, quality.json and quality.png,
of the toy transformer quality-toy-dit.md and so on.
All results are kept in a work folder for each base: the command goes on where it was stopped, makes anew what was made
with other settings (not what other code would make: delete a method's files for that), and may run several times at
once on different methods. The tables hold everything that the work folder has rows of.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import (
    add_results,
    add_toys,
    add_trainings,
    add_work,
    benchmark_parser,
    check_known,
    measure_all,
    methods_on,
    named_for,
    work_path,
)
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import number, over_trainings, results_folder, with_errors, write_page, write_rows

_SIZES = ("pictures", "pairs", "iterations", "omegas")  # that the command line can change
_NOT_MEASURED = (None, None)


def picture_metrics(experiment, own, target) -> dict:
    """What pictures are worth. `target`: those of CFG."""
    from comfyui_agd.benchmarks import metrics

    real = experiment.reference
    return experiment.accuracy_and_distance(own) | {
        "prompt_accuracy_above_cfg": metrics.mean_and_error(own.correct.double() - target.correct.double()),
        "frechet_above_cfg": metrics.frechet_above(own.features, target.features, real.features),
        "frechet_to_cfg": metrics.frechet(own.features, target.features, paired=True),
        "precision": metrics.precision(own.features, real),
        "recall": metrics.recall(own.features, real.features),
    }


def row_of_real(experiment) -> dict:
    """Of real pictures of the captions: what no sampler can do better."""
    from comfyui_agd.benchmarks.experiment import SampledAt
    from comfyui_agd.benchmarks.methods import METHODS

    at = SampledAt(experiment.best_omega)
    target = experiment.samples("cfg", METHODS["cfg"].prepare(experiment, "cfg"), at)
    return {"method": "real", "omega": 1.0} | with_errors(picture_metrics(experiment, experiment.decoded, target))


class MethodMeasurement:
    """A method, and CFG, with which it is compared. `seed`: of its training."""

    def __init__(self, experiment, name: str, seed: int = 0):
        from comfyui_agd.benchmarks.methods import METHODS

        self.experiment, self.name = experiment, name
        self.label = f"{name}-seed{seed}" if seed else name  # of its files
        self.method = METHODS[name].prepare(experiment.of_training(seed), self.label)
        self.cfg = METHODS["cfg"].prepare(experiment, "cfg")

    def row(self, omega: float, steps: int, negatives: bool) -> dict:
        """All that is measured of one setting. `negatives`: with what negative prompts do."""
        from comfyui_agd.benchmarks.experiment import SampledAt
        from comfyui_agd.benchmarks.metrics import mean_and_error

        at = SampledAt(omega, steps)
        own = self.experiment.samples(self.label, self.method, at)
        # What has no guidance scale is compared with CFG at its best.
        compared = SampledAt(omega if omega > 1 else self.experiment.best_omega)
        target = self.experiment.samples("cfg", self.cfg, compared)
        measured = {"seconds_per_image": mean_and_error(own.seconds)} | picture_metrics(self.experiment, own, target)
        measured["distance_to_cfg"] = self.experiment.distance_to_cfg(own, compared)
        row = {
            "model": self.experiment.base.name,
            "method": self.name,
            "omega": omega,
            "steps": steps,
            "pictures": len(own.correct),
            "parameters_percent": number(100 * self.method.parameters / self.experiment.base_parameters),
            "evaluations_per_step": number(own.evaluations_per_step(steps)),
        }
        return row | with_errors(measured | self._gaps(omega, steps) | self._negatives(at, negatives))

    def _gaps(self, omega: float, steps: int) -> dict:
        """Gap closed and cosine, at this omega and at each."""
        from comfyui_agd.benchmarks.metrics import mean_and_error
        from comfyui_agd.examples.toy.sampling import STEPS

        measured = dict.fromkeys(("gap_closed", "direction_cosine"), _NOT_MEASURED)
        if steps != STEPS or self.method.evaluate is None:
            return measured
        for key, blocks in self.experiment.gap(self.label, self.method).items():
            by_omega = dict(zip(self.experiment.sizes.gap_omegas, map(mean_and_error, blocks), strict=True))
            measured |= {f"{key}_at_{o:g}": value for o, value in by_omega.items()}
            measured[key] = by_omega.get(omega, _NOT_MEASURED)
        return measured

    def _negatives(self, at, asked: bool) -> dict:
        """What negative prompts do."""
        from comfyui_agd.benchmarks import metrics
        from comfyui_agd.benchmarks.experiment import SampledAt

        if not asked or at.omega <= 1:
            return dict.fromkeys(("negative_reduction", "unwanted_without", "unwanted_with"), _NOT_MEASURED)
        seen = self.experiment.unwanted(self.label, self.method, at)
        of_cfg = self.experiment.unwanted("cfg", self.cfg, SampledAt(at.omega))
        return {
            "unwanted_without": metrics.mean_and_error(seen.without),
            "unwanted_with": metrics.mean_and_error(seen.with_negative),
            "negative_reduction": metrics.share_of_reduction(seen, of_cfg),
        }


def measure(experiment, name: str, seeds: Sequence[int] = (0,)) -> None:
    """Every row of a method, into the work folder. `seeds`: of an adapter's trainings."""
    from comfyui_agd.benchmarks.experiment import setting_name
    from comfyui_agd.benchmarks.methods import METHODS

    measured = [MethodMeasurement(experiment, name, seeds[0])]
    if measured[0].method.file:
        measured += [MethodMeasurement(experiment, name, seed) for seed in seeds[1:]]
    for omega in METHODS[name].omegas or experiment.sizes.omegas:
        rows = rows_at(measured, omega)
        experiment.work.save_rows(setting_name(name, omega), rows)
        print(
            f"{experiment.base.name}: {name}, omega {omega:g}: prompt accuracy {rows[0]['prompt_accuracy']:.4f}, "
            f"Fréchet distance {rows[0]['frechet_to_real']:.2f}, {rows[0]['evaluations_per_step']:.2f} evaluations "
            "per step",
            flush=True,
        )


def rows_at(measured: list[MethodMeasurement], omega: float) -> list[dict]:
    """Of a method's trainings: at all steps, and at equal numbers of evaluations: at each omega what CFG has with half
    of the steps, at the best one fewer, too."""
    from comfyui_agd.benchmarks.experiment import BUDGETS
    from comfyui_agd.examples.toy.sampling import STEPS

    def row(steps: int, negatives: bool) -> dict:
        rows = [each.row(omega, steps, negatives) for each in measured]
        return over_trainings(rows) if measured[0].method.file else rows[0]

    rows = [row(STEPS, negatives=True)]
    budgets = BUDGETS if omega in (1.0, measured[0].experiment.best_omega) else BUDGETS[:1]
    steps = [max(1, round(budget / rows[0]["evaluations_per_step"])) for budget in budgets]
    # In order, and each of them once.
    fewer = [count for count in dict.fromkeys(steps) if count < STEPS]
    return rows + [row(count, negatives=count == steps[0]) for count in fewer]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="few methods, few pictures, hardly trained")
    add_toys(parser)
    add_trainings(parser)
    parser.add_argument("--seed", type=int, help="of the only training of each adapter")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods; default: all")
    parser.add_argument("--list", action="store_true", help="say which methods there are, and do nothing")
    add_work(parser, "quality")
    add_results(parser, "quality.md, .json and .png, and those of the toy transformer")
    parser.add_argument("--pictures", type=int, help="per setting")
    parser.add_argument("--pairs", type=int, help="of pictures without and with a negative prompt, per setting")
    parser.add_argument("--iterations", type=int, help="of every training")
    parser.add_argument("--omegas", type=float, nargs="+", help="guidance scales")
    return parser.parse_args(argv)


def write_known(args: argparse.Namespace, experiments: Sequence) -> None:
    """The rows that there are by now, where they are asked for."""
    if args.json:
        write_rows(args.json, [row for experiment in experiments for row in report_rows(experiment)])


def report_rows(experiment) -> list[dict]:
    """All that its work folder has, in the order of the page."""
    from comfyui_agd.benchmarks import report

    return report.in_order(experiment.work.rows())


def write_results(experiment, args: argparse.Namespace) -> None:
    """The page of a base, with its plot."""
    from comfyui_agd.benchmarks import report

    rows = report_rows(experiment)
    print(*report.plain(rows), sep="\n")
    folder, name = results_folder(args), named_for("quality", experiment.base.name)
    if folder and rows:
        page = report.page(rows, row_of_real(experiment), experiment.sizes, experiment.base, made_on(args.device))
        write_page(folder, name, page, rows)
        report.plot(rows, experiment.best_omega).save(folder / f"{name}.png")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.experiment import QUICK_SIZES, Sizes, ToyExperiment
    from comfyui_agd.benchmarks.methods import METHODS, QUICK, methods_for
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    if args.list:
        print("\n".join(f"{name:<24}{method.what}" for name, method in METHODS.items()))
        return
    check_known(args.only, METHODS)
    given = {key: getattr(args, key) for key in _SIZES if getattr(args, key) is not None}
    sizes = dataclasses.replace(QUICK_SIZES if args.quick else Sizes(), **given)
    experiments = [ToyExperiment(WorkFolder(work_path(args, "quality", base)), sizes, base) for base in args.base]
    there = {experiment.base.name: methods_for(experiment) for experiment in experiments}
    refusal = "On {bases} there is no {methods}: it is for a UNet."
    wanted = methods_on(there, args.only, QUICK if args.quick else METHODS, refusal)
    failed = []
    seeds = range(args.trainings) if args.seed is None else (args.seed,)
    for experiment in experiments:

        def own(name: str, experiment=experiment) -> None:
            measure(experiment, name, seeds)
            write_known(args, experiments)

        failed += [f"{name} on {experiment.base.name}" for name in measure_all(wanted[experiment.base.name], own)]
        write_results(experiment, args)
    write_known(args, experiments)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}; the same command tries again.")


if __name__ == "__main__":
    main()

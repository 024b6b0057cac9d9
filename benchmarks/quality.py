"""How good guidance in one pass is on the toy, beside what else there is: every method in one table.

    python benchmarks/quality.py [--base toy-dit] [--quick] [--only METHOD ...] [--work DIR] [--json FILE]
                                 [--device cuda]

Trains what has to be trained, samples through ComfyUI's KSampler, and writes quality.md, quality.json and quality.png,
of the toy transformer quality-toy-dit.md and so on.
All results are kept in the work folder: the command goes on where it was stopped, makes anew what was made with other
settings (not what other code would make: delete a method's files for that), and may run several times at once on
different methods. The tables hold everything that the work folder has rows of.
"""

import argparse
import dataclasses
import functools
import sys

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_results, add_work, benchmark_parser, measure_all, work_path
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import number, results_folder, with_errors, write_page, write_rows

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
    """A method, and CFG, with which it is compared."""

    def __init__(self, experiment, name: str):
        from comfyui_agd.benchmarks.methods import METHODS

        self.experiment, self.name = experiment, name
        self.method, self.cfg = (METHODS[each].prepare(experiment, each) for each in (name, "cfg"))

    def row(self, omega: float, steps: int) -> dict:
        """All that is measured of one setting."""
        from comfyui_agd.benchmarks.experiment import SampledAt
        from comfyui_agd.benchmarks.metrics import mean_and_error

        own = self.experiment.samples(self.name, self.method, SampledAt(omega, steps))
        # What has no guidance scale is compared with CFG at its best.
        at = SampledAt(omega if omega > 1 else self.experiment.best_omega)
        target = self.experiment.samples("cfg", self.cfg, at)
        measured = {"seconds_per_image": mean_and_error(own.seconds)} | picture_metrics(self.experiment, own, target)
        row = {
            "model": self.experiment.base.name,
            "method": self.name,
            "omega": omega,
            "steps": steps,
            "pictures": len(own.correct),
            "parameters_percent": number(100 * self.method.parameters / self.experiment.base_parameters),
            "evaluations_per_step": number(own.evaluations_per_step(steps)),
        }
        return row | with_errors(measured | self._gaps(omega, steps) | self._negatives(omega, steps))

    def _gaps(self, omega: float, steps: int) -> dict:
        """Gap closed and cosine, at this omega and at each."""
        from comfyui_agd.benchmarks.metrics import mean_and_error
        from comfyui_agd.examples.toy.sampling import STEPS

        measured = dict.fromkeys(("gap_closed", "direction_cosine"), _NOT_MEASURED)
        if steps != STEPS or self.method.evaluate is None:
            return measured
        for key, blocks in self.experiment.gap(self.name, self.method).items():
            by_omega = dict(zip(self.experiment.sizes.gap_omegas, map(mean_and_error, blocks), strict=True))
            measured |= {f"{key}_at_{o:g}": value for o, value in by_omega.items()}
            measured[key] = by_omega.get(omega, _NOT_MEASURED)
        return measured

    def _negatives(self, omega: float, steps: int) -> dict:
        """What negative prompts do."""
        from comfyui_agd.benchmarks import metrics
        from comfyui_agd.examples.toy.sampling import STEPS

        if steps != STEPS or omega <= 1:
            return dict.fromkeys(("negative_reduction", "unwanted_without", "unwanted_with"), _NOT_MEASURED)
        seen = self.experiment.unwanted(self.name, self.method, omega)
        of_cfg = self.experiment.unwanted("cfg", self.cfg, omega)
        return {
            "unwanted_without": metrics.mean_and_error(seen.without),
            "unwanted_with": metrics.mean_and_error(seen.with_negative),
            "negative_reduction": metrics.share_of_reduction(seen, of_cfg),
        }


def measure(experiment, name: str) -> None:
    """Every row of a method, into the work folder."""
    from comfyui_agd.benchmarks.experiment import BUDGETS, setting_name
    from comfyui_agd.benchmarks.methods import METHODS
    from comfyui_agd.examples.toy.sampling import STEPS

    measurement = MethodMeasurement(experiment, name)
    for omega in METHODS[name].omegas or experiment.sizes.omegas:
        row = measurement.row(omega, STEPS)
        rows = [row]
        if omega in (1.0, experiment.best_omega):  # at equal numbers of evaluations
            fewer = {max(1, round(budget / row["evaluations_per_step"])) for budget in BUDGETS}
            rows += [measurement.row(omega, steps) for steps in sorted(fewer) if steps < STEPS]
        experiment.work.save_rows(setting_name(name, omega), rows)
        print(
            f"{name}, omega {omega:g}: prompt accuracy {row['prompt_accuracy']:.4f}, Fréchet distance "
            f"{row['frechet_to_real']:.2f}, {row['evaluations_per_step']:.2f} evaluations per step",
            flush=True,
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="few methods, few pictures, hardly trained")
    parser.add_argument("--base", choices=("toy", "toy-dit"), default="toy", help="the base to measure on")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods; default: all")
    parser.add_argument("--list", action="store_true", help="say which methods there are, and do nothing")
    add_work(parser, "quality")
    add_results(parser, "quality.md, .json and .png")
    parser.add_argument("--pictures", type=int, help="per setting")
    parser.add_argument("--pairs", type=int, help="of pictures without and with a negative prompt, per setting")
    parser.add_argument("--iterations", type=int, help="of every training")
    parser.add_argument("--omegas", type=float, nargs="+", help="guidance scales")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks import report
    from comfyui_agd.benchmarks.experiment import QUICK_SIZES, Sizes, ToyExperiment
    from comfyui_agd.benchmarks.methods import METHODS, QUICK, methods_for
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    if args.list:
        print("\n".join(f"{name:<24}{method.what}" for name, method in METHODS.items()))
        return
    if unknown := sorted(set(args.only or ()) - METHODS.keys()):
        sys.exit(f"There is no method {', '.join(unknown)}; --list says which there are.")
    given = {key: getattr(args, key) for key in _SIZES if getattr(args, key) is not None}
    sizes = dataclasses.replace(QUICK_SIZES if args.quick else Sizes(), **given)
    name = "quality" if args.base == "toy" else f"quality-{args.base}"
    experiment = ToyExperiment(WorkFolder(work_path(args, name)), sizes, args.base)
    there = methods_for(experiment)
    if without := sorted(set(args.only or ()) - there.keys()):
        sys.exit(f"On {args.base} there is no {', '.join(without)}: it is for a UNet.")
    names = args.only or ([each for each in QUICK if each in there] if args.quick else there)
    failed = measure_all(names, functools.partial(measure, experiment))
    rows = report.in_order(experiment.work.rows())
    print(*report.plain(rows), sep="\n")
    if args.json:
        write_rows(args.json, rows)
    folder = results_folder(args)
    if folder and rows:
        page = report.page(rows, row_of_real(experiment), sizes, experiment.base, made_on(args.device))
        write_page(folder, name, page, rows)
        report.plot(rows, experiment.best_omega).save(folder / f"{name}.png")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}; the same command tries again.")


if __name__ == "__main__":
    main()

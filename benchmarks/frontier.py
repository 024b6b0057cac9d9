"""What is worth its evaluations: quality against evaluations per picture, of everything that makes guidance cheaper.

    python benchmarks/frontier.py [--base toy-dit] [--quick] [--regime usual] [--only METHOD ...] [--pictures N]
                                  [--work DIR] [--trained DIR] [--json FILE] [--device cuda]

CFG with fewer steps, the adapter, training-free, caches of steps, ways to leave out the negative prompt, and the
adapter with the caches, in the usual regime and in a harder one, which a small table chooses: there CFG with half the
steps is worse. Takes `quality.py`'s adapters from its work folder, `--trained`, or trains them. Writes frontier.md,
frontier.json and a plot per regime, of the toy transformer frontier-toy-dit.md and so on.
All results are kept in the work folder: the command goes on where it was stopped, and makes anew what was made with
other settings or another adapter. The page holds everything that the work folder has rows of.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import (
    add_results,
    add_toys,
    add_work,
    benchmark_parser,
    check_known,
    measure_all,
    methods_on,
    named_for,
    work_path,
)
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import number, results_folder, with_errors, write_page, write_rows

USUAL, HARDER = "usual", "harder"
PICTURES, CANDIDATE_PICTURES = 256, 16


def candidates(omega: float, scheduler: str) -> dict[str, dict]:
    """What the harder regime is chosen from, as settings of `SampledAt`; the usual one is the first."""
    others = [each for each in ("normal", "simple", "karras", "exponential", "beta") if each != scheduler]
    return {
        USUAL: {"omega": omega},
        **{f"omega {value:g}": {"omega": value} for value in (5.0, 8.0)},
        **{each: {"omega": omega, "scheduler": each} for each in others},
        **{f"omega 5, {each}": {"omega": 5.0, "scheduler": each} for each in ("karras", "exponential")},
        "96 pixels": {"omega": omega, "size": 96},
    }


class FrontierMeasurement:
    """The rows of one regime: `at` with other numbers of steps."""

    def __init__(self, experiment, regime: str, at):
        from comfyui_agd.benchmarks.experiment import TRUE_STEPS, PreparedMethod

        self.experiment, self.regime, self.at = experiment, regime, at
        self.cfg = PreparedMethod(experiment.parts.model, {"sampling": {}})
        self.true = dataclasses.replace(at, steps=TRUE_STEPS)

    def row(self, name: str, method, steps: int) -> dict:
        """Everything about one setting of a method; `name`: its files'."""
        from comfyui_agd.benchmarks import metrics

        at = dataclasses.replace(self.at, steps=steps)
        own = self.experiment.samples(name, method, at)
        real, target = self.experiment.reference, self.experiment.samples("cfg", self.cfg, self.true)
        measured = {
            "distance_to_cfg": self.experiment.distance_to_cfg(own, at),
            **self.experiment.accuracy_and_distance(own),
            "frechet_above_cfg": metrics.frechet_above(own.features, target.features, real.features),
            "seconds_per_image": metrics.mean_and_error(own.seconds),
        }
        row = {"model": self.experiment.base.name, "regime": self.regime, "steps": steps}
        row |= {"pictures": len(own.correct), "omega": at.omega} | at.named
        return row | {"evaluations": number(own.evaluations_per_step(steps) * steps)} | with_errors(measured)


def candidate_row(experiment, regime: str, settings: dict) -> dict:
    """How far CFG with few steps is from CFG with 50, in a candidate for the harder regime."""
    from comfyui_agd.benchmarks.experiment import TRUE_STEPS, SampledAt
    from comfyui_agd.benchmarks.frontier_report import CANDIDATE_STEPS

    measurement = FrontierMeasurement(experiment, regime, SampledAt(**settings))
    rows = {steps: measurement.row("cfg", measurement.cfg, steps) for steps in (TRUE_STEPS, *CANDIDATE_STEPS)}
    keys = ("distance_to_cfg", "frechet_above_cfg")
    by_steps = {
        f"{key}_{steps}{error}": rows[steps][key + error]
        for steps in CANDIDATE_STEPS
        for key in keys
        for error in ("", "_se")
    }
    first = {"regime": regime, "settings": settings, "pictures": rows[TRUE_STEPS]["pictures"]}
    return first | {"prompt_accuracy": rows[TRUE_STEPS]["prompt_accuracy"]} | by_steps


def harder(rows: list[dict], highest_omega: float) -> dict:
    """The candidate in which CFG with half the steps is furthest from CFG, of those where CFG with all of them is good
    and near, up to the highest omega that adapters are trained for."""
    from comfyui_agd.benchmarks.frontier_report import CANDIDATE_STEPS, FURTHEST_AT_ALL_STEPS, LEAST_ACCURACY

    all_steps, half, _ = CANDIDATE_STEPS
    trained = [row for row in rows if row["settings"]["omega"] <= highest_omega]
    good = [row for row in trained if row["prompt_accuracy"] >= LEAST_ACCURACY]
    near = [row for row in good if row[f"distance_to_cfg_{all_steps}"] <= FURTHEST_AT_ALL_STEPS]
    return max(near or trained, key=lambda row: row[f"distance_to_cfg_{half}"])


def measure(study, regime: str, at, name: str) -> None:
    """Every row of a method in a regime, into the work folder."""
    from comfyui_agd.benchmarks.frontier_methods import FRONTIER

    measurement, method, rows = FrontierMeasurement(study.experiment, regime, at), FRONTIER[name], []
    for setting in method.settings:
        prepared = setting.prepare(study, dataclasses.replace(at, steps=setting.steps))
        file = "-".join([name, *"".join(c if c.isalnum() else " " for c in setting.name).split()])
        row = measurement.row(file, prepared, setting.steps)
        rows.append({"method": name, "group": method.group.value, "setting": setting.title} | row)
        print(
            f"{regime}: {name}, {setting.title}: {row['evaluations']:.1f} evaluations, "
            f"{row['distance_to_cfg']:.3f} from CFG, accuracy {row['prompt_accuracy']:.3f}",
            flush=True,
        )
    study.experiment.work.save_rows(f"{regime}-{name}", rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="few methods, few pictures, hardly trained")
    add_toys(parser)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods; default: all")
    parser.add_argument("--regime", choices=(USUAL, HARDER), help="this one; default: both")
    parser.add_argument("--list", action="store_true", help="say which methods there are, and do nothing")
    add_work(parser, "frontier")
    parser.add_argument("--trained", type=Path, help="quality.py's work folder; default: build/quality, or its own")
    add_results(parser, "frontier.md, .json and .png")
    parser.add_argument("--pictures", type=int, help=f"per setting; default: {PICTURES}")
    return parser.parse_args(argv)


def made_study(args: argparse.Namespace, base: str):
    from comfyui_agd.benchmarks.experiment import QUICK_SIZES, Sizes, ToyExperiment
    from comfyui_agd.benchmarks.frontier_methods import FrontierStudy
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    sizes, trained = QUICK_SIZES if args.quick else Sizes(), argparse.Namespace(work=args.trained, quick=args.quick)
    sampled = dataclasses.replace(sizes, pictures=args.pictures or (sizes.pictures if args.quick else PICTURES))
    experiment = ToyExperiment(WorkFolder(work_path(args, "frontier", base)), sampled, base)
    return FrontierStudy(experiment, ToyExperiment(WorkFolder(work_path(trained, "quality", base)), sizes, base))


def measure_candidates(study, quick: bool) -> list[dict]:
    """The rows of the candidates for the harder regime, of fewer pictures."""
    from comfyui_agd.benchmarks.experiment import ToyExperiment
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    own = study.experiment
    sizes = dataclasses.replace(own.sizes, pictures=min(CANDIDATE_PICTURES, own.sizes.pictures))
    experiment = ToyExperiment(WorkFolder(own.work.folder / "candidates"), sizes, own.base.name)
    named = candidates(own.best_omega, own.base.scheduler)
    chosen = list(named.items())[:2] if quick else named.items()
    return [candidate_row(experiment, name, settings) for name, settings in chosen]


def measure_base(study, names: list[str], args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """The base's rows, of which a page is written, and the methods that failed."""
    from comfyui_agd.benchmarks import frontier_report
    from comfyui_agd.benchmarks.experiment import SampledAt
    from comfyui_agd.benchmarks.frontier_methods import methods_for

    base, failed = study.experiment.base, []
    tried = measure_candidates(study, args.quick)
    print(*frontier_report.plain_candidates(tried), sep="\n", flush=True)
    regimes = {USUAL: tried[0], HARDER: harder(tried[1:], study.trained.train_config().omega_max)}
    for regime in [args.regime] if args.regime else regimes:
        at = SampledAt(**regimes[regime]["settings"])
        failed += [f"{name} on {base.name}" for name in measure_all(names, partial(measure, study, regime, at))]
    rows = study.experiment.work.rows(
        f"{regime}-{name}" for regime in regimes for name in methods_for(study.experiment)
    )
    print(*frontier_report.plain(rows), sep="\n")
    if folder := results_folder(args):
        name = named_for("frontier", base.name)
        report = frontier_report.Report(rows, tried, regimes, base, made_on(args.device))
        write_page(folder, name, report.page(name), rows)
        for regime in report.regimes_measured:
            report.plot(regime).save(folder / f"{name}-{regime}.png")
    return rows, failed


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.frontier_methods import FRONTIER, QUICK, methods_for

    if args.list:
        print("\n".join(f"{name:<20}{method.what}" for name, method in FRONTIER.items()))
        return
    check_known(args.only, FRONTIER)
    studies = {base: made_study(args, base) for base in args.base}
    there = {base: methods_for(study.experiment) for base, study in studies.items()}
    refusal = "On {bases} {methods} has no effect: it is for a UNet."
    wanted = methods_on(there, args.only, QUICK if args.quick else FRONTIER, refusal)
    rows, failed = [], []
    for base, study in studies.items():
        found, missing = measure_base(study, wanted[base], args)
        rows, failed = rows + found, failed + missing
    if args.json:
        write_rows(args.json, rows)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}; the same command tries again.")


if __name__ == "__main__":
    main()

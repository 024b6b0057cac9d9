"""How good guidance in one pass is on the toy, beside what else there is: every method in one table.

    python benchmarks/quality.py [--quick] [--only METHOD ...] [--work DIR] [--json FILE] [--device cuda]

Trains what has to be trained, samples through ComfyUI's KSampler, and writes quality.md, quality.json and quality.png.
All results are kept in the work folder: the command goes on where it was stopped, makes anew what was made with other
settings (not what other code would make: delete a method's files for that), and may run several times at once on
different methods. The tables hold everything that the work folder has rows of.
"""

import argparse
import dataclasses
import sys
import traceback
from pathlib import Path

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.output import RESULTS, made_on, number, with_errors, write, write_rows


def of_pictures(lab, own: dict, target: dict) -> dict:
    """What pictures are worth. `target`: those of CFG."""
    from comfyui_agd.benchmarks import metrics

    features, real = own["features"], lab.reference
    return {
        "prompt_accuracy": metrics.mean_and_error(own["correct"]),
        "prompt_accuracy_above_cfg": metrics.mean_and_error(own["correct"].double() - target["correct"].double()),
        "frechet_to_real": metrics.frechet(features, real["features"]),
        "frechet_above_cfg": metrics.frechet_above(features, target["features"], real["features"]),
        "frechet_to_cfg": metrics.frechet(features, target["features"], paired=True),
        "precision": metrics.precision(features, real["features"], real["radii"]),
        "recall": metrics.recall(features, real["features"]),
    }


def row_of_real(lab) -> dict:
    """Of real pictures of the captions: what no sampler can do better."""
    from comfyui_agd.benchmarks.methods import METHODS
    from comfyui_agd.examples.toy.measure import omega_star
    from comfyui_agd.examples.toy.sampling import STEPS

    target = lab.pictures("cfg", METHODS["cfg"].make(lab, "cfg"), omega_star(), STEPS)
    return {"method": "real", "omega": 1.0} | with_errors(of_pictures(lab, lab.decoded, target))


def row_of(lab, method: str, ready, cfg, omega: float, steps: int) -> dict:
    """All that is measured of one setting. `cfg`: CFG, made ready."""
    from comfyui_agd.benchmarks import metrics
    from comfyui_agd.examples.toy.measure import omega_star
    from comfyui_agd.examples.toy.sampling import STEPS

    own = lab.pictures(method, ready, omega, steps)
    # What has no guidance scale is compared with CFG at its best.
    target = lab.pictures("cfg", cfg, omega if omega > 1 else omega_star(), STEPS)
    count = len(own["features"])
    measured = {"seconds_per_image": metrics.mean_and_error(own["seconds"])} | of_pictures(lab, own, target)
    measured |= dict.fromkeys(("gap_closed", "direction_cosine"), (None, None))
    measured |= dict.fromkeys(("negative_reduction", "unwanted_without", "unwanted_with"), (None, None))
    if steps == STEPS and ready.evaluate is not None:
        for key, blocks in lab.gap(method, ready).items():
            by_omega = dict(zip(lab.sizes.gap_omegas, map(metrics.mean_and_error, blocks), strict=True))
            measured |= {f"{key}_at_{o:g}": value for o, value in by_omega.items()}
            measured[key] = by_omega.get(omega, (None, None))
    if steps == STEPS and omega > 1:
        seen, of_cfg = lab.unwanted(method, ready, omega), lab.unwanted("cfg", cfg, omega)
        measured |= {f"unwanted_{key}": metrics.mean_and_error(values) for key, values in seen.items()}
        measured["negative_reduction"] = metrics.share_of_reduction(seen, of_cfg)
    row = {
        "model": "toy",
        "method": method,
        "omega": omega,
        "steps": steps,
        "pictures": count,
        "parameters_percent": number(100 * ready.parameters / lab.base_parameters),
        "evaluations_per_step": number(own["evaluations"].item() / (count * steps)),
    }
    return row | with_errors(measured)


def measure(lab, method: str) -> None:
    """Every row of a method, into the work folder."""
    from comfyui_agd.benchmarks.lab import BUDGETS, setting
    from comfyui_agd.benchmarks.methods import METHODS
    from comfyui_agd.examples.toy.measure import omega_star
    from comfyui_agd.examples.toy.sampling import STEPS

    ready, cfg = (METHODS[name].make(lab, name) for name in (method, "cfg"))
    for omega in METHODS[method].omegas or lab.sizes.omegas:
        row = row_of(lab, method, ready, cfg, omega, STEPS)
        rows = [row]
        if omega in (1.0, omega_star()):  # at equal numbers of evaluations
            fewer = {max(1, round(budget / row["evaluations_per_step"])) for budget in BUDGETS}
            rows += [row_of(lab, method, ready, cfg, omega, steps) for steps in sorted(fewer) if steps < STEPS]
        lab.work.save_rows(setting(method, omega), rows)
        print(
            f"{method}, omega {omega:g}: prompt accuracy {row['prompt_accuracy']:.4f}, Fréchet distance "
            f"{row['frechet_to_real']:.2f}, {row['evaluations_per_step']:.2f} evaluations per step",
            flush=True,
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods; default: all")
    parser.add_argument("--list", action="store_true", help="say which methods there are, and do nothing")
    parser.add_argument("--quick", action="store_true", help="few methods, few pictures, hardly trained")
    parser.add_argument("--work", type=Path, help="what is kept; default: build/quality, or build/quality-quick")
    parser.add_argument(
        "--results", type=Path, help="where to write quality.md, .json and .png; default: results, unless quick"
    )
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pictures", type=int, help="per setting")
    parser.add_argument("--pairs", type=int, help="of pictures without and with a negative prompt, per setting")
    parser.add_argument("--iterations", type=int, help="of every training")
    parser.add_argument("--omegas", type=float, nargs="+", help="guidance scales")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks import lab, report
    from comfyui_agd.benchmarks.methods import METHODS, QUICK

    if args.list:
        print("\n".join(f"{name:<24}{method.what}" for name, method in METHODS.items()))
        return
    if unknown := sorted(set(args.only or ()) - METHODS.keys()):
        sys.exit(f"There is no method {', '.join(unknown)}; --list says which there are.")
    given = {key: getattr(args, key) for key in ("pictures", "pairs", "iterations", "omegas")}
    given = {key: value for key, value in given.items() if value is not None}
    sizes = dataclasses.replace(lab.QUICK if args.quick else lab.Sizes(), **given)
    work = lab.Work(args.work or Path("build") / ("quality-quick" if args.quick else "quality"))
    own, failed = lab.Lab(work, sizes), []
    for method in args.only or (QUICK if args.quick else METHODS):
        try:
            measure(own, method)
        except Exception:  # one method that fails in the night should not keep the others from their turn
            traceback.print_exc()
            failed.append(method)
    rows = report.in_order(work.rows())
    print(report.plain(rows))
    if args.json:
        write_rows(args.json, rows)
    results = args.results or (None if args.quick else RESULTS)
    if results and rows:
        write(results, "quality", report.page(rows, row_of_real(own), sizes, made_on(args.device)), rows)
        report.plot(rows).save(results / "quality.png")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}; the same command tries again.")


if __name__ == "__main__":
    main()

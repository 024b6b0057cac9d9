"""Which parts of an adapter and of its training close the gap, and what it takes: parameters, iterations, prompts.

    python benchmarks/ablation.py [--quick] [--only VARIANT ...] [--work DIR] [--json FILE] [--device cuda]

Every variant is trained on the toy with the same captions, seeds and recorded teacher, but for what it is about, and
measured on held-out captions, once away from the empty prompt and once from negative prompts that no training had.
Writes ablation.md and ablation.json. Trained adapters are kept in the work folder: the command goes on where it was
stopped. One adapter per variant; `quality.py` says what a gap is worth in pictures.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.agd_core.kinds import hears_negative
from comfyui_agd.benchmarks.output import RESULTS, made_on, number, write, write_rows

ITERATIONS, CAPTIONS = 300, 1000
BUDGETS = (1.0, 2.0, 5.0)
# As arXiv 2503.07274 has them; each is a switch that is tried alone.
PAPER = {
    "gain": False,
    "omega_embedding": "fourier",
    "shared_encoder": False,
    "loss": "plain",
    "omega_sampling": "uniform",
}
SWITCHES = {
    "gain": {"gain": True},
    "log omega": {"omega_embedding": "log"},
    "one encoder": {"shared_encoder": True},
    "balanced loss": {"loss": "balanced"},
    "log-uniform omega": {"omega_sampling": "log_uniform"},
}
# An encoder of omega and t that leaves something of a small budget for the rest.
_ENCODERS = {1.0: 8, 2.0: 16, 5.0: 32}


@dataclass(frozen=True)
class Variant:
    """An adapter to train. `settings` are the trainer's; `percent` of the base's parameters sets its width; `width` is
    that of the only sites it is for."""

    section: str
    name: str
    settings: dict = field(default_factory=dict)
    percent: float = 5.0
    captions: int = CAPTIONS
    width: int | None = None

    @property
    def hears_negative(self) -> bool:
        return hears_negative(self.settings.get("kind", "delta"))


def variants(iterations: int) -> list[Variant]:
    """In the order of the tables."""

    def ours(section: str, name: str, percent: float = 5.0, captions: int = CAPTIONS, width=None, **settings):
        return Variant(section, name, settings, percent, captions, width)

    paper = {"kind": "cross_attention", **PAPER}
    found = [Variant("Switches of the paper's cross-attention", "as published", paper)]
    found += [Variant(found[0].section, f"{name} alone", paper | switch) for name, switch in SWITCHES.items()]
    found += [ours(found[0].section, "all of them", kind="cross_attention")]
    section = "Kinds, with all switches"
    found += [
        ours(section, "offset", kind="offset"),
        ours(section, "low_rank without m", kind="low_rank", modulated=False),
        ours(section, "low_rank", kind="low_rank"),
        ours(section, "scale", kind="scale", learning_rate=2e-2),
        ours(section, "delta"),
        ours(section, "delta with rank 2", rank=2),
        ours(section, "delta with rank 4", rank=4),
    ]
    section = "delta, without one of them"
    back = {"gain": False, "omega_embedding": "fourier", "loss": "plain", "omega_sampling": "uniform"}
    for name, key in zip(("gain", "log omega", "balanced loss", "log-uniform omega"), back, strict=True):
        found += [ours(section, f"without {name}", **{key: back[key]})]
    section = "delta, more"
    found += [
        ours(section, "half on policy", on_policy=0.5),
        ours(section, "only the 4 deep sites", width=128),
        ours(section, "only the 3 outer sites", width=64),
    ]
    for kind in ("cross_attention", "low_rank", "delta"):
        for percent in BUDGETS[:-1]:
            own = {"kind": kind, "encoder_width": _ENCODERS[percent]}
            found += [ours("Parameters", f"{kind}, {percent:g} %", percent, **own)]
    found += [ours("Parameters", "delta, 10 %", 10.0)]
    for factor in (1 / 3, 3):
        count = max(1, round(iterations * factor))
        found += [ours("Iterations", f"delta, {count} iterations", iterations=count)]
    for reuse in (1, 12):
        found += [ours("Teacher evaluations", f"delta, each state {reuse} times", reuse=reuse)]
    return found + [ours("Prompts", f"delta, {n} captions", captions=n) for n in (10, 50, 200)]


def measure(lab, variant: Variant) -> dict:
    """Train it, unless it is there, and measure."""
    from comfyui_agd.agd_core import checkpoint
    from comfyui_agd.benchmarks import methods, metrics

    settings = {"kind": "delta", "encoder_width": 32} | variant.settings
    hidden = methods.widest(lab, settings, variant.percent, variant.width)
    config = lab.train_config(**settings, hidden=hidden)
    stem = "-".join(f"{variant.section} {variant.name}".replace("%", "pct").replace(",", "").split()).lower()
    only = {"width": variant.width} if variant.width else {}
    how = (lab, stem, config, lab.negatives(variant.hears_negative), [], methods.train_adapter)
    diverged, file = methods.trained(*how, **only)
    row = {"section": variant.section, "variant": variant.name, "iterations": config.iterations}
    row |= {"teacher_evaluations": 2 * config.batch * -(-config.iterations // config.reuse), "model": "toy"}
    if diverged is None:
        return row | {"parameters_percent": None}
    info, state = checkpoint.load_state(file)
    ready = methods.measured(lab, lab.parts.model, info, state, {"weights": methods.checksum(file)})
    row["parameters_percent"] = round(100 * ready.parameters / lab.base_parameters, 2)
    for key, negatives in (("gap_closed", False), ("gap_closed_from_negatives", True)):
        closed = lab.gap(stem, ready, negatives)["gap_closed"]
        for omega, blocks in zip(lab.sizes.gap_omegas, closed, strict=True):
            row[f"{key}_{omega:g}"], row[f"{key}_{omega:g}_se"] = map(number, metrics.mean_and_error(blocks))
    return row


def table(rows: list[dict], omegas: tuple[float, ...]) -> str:
    """Markdown, a table per section."""
    lines = []
    for section in dict.fromkeys(row["section"] for row in rows):
        lines += [f"## {section}", ""]
        headings = ["variant", "parameters, %", "iterations", "teacher evaluations"]
        headings += [f"gap at {omega:g}" for omega in omegas] + [f"from negatives, {omega:g}" for omega in omegas]
        lines += [f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}"]
        for row in rows:
            if row["section"] != section:
                continue
            cells = [row["variant"], row["parameters_percent"], row["iterations"], f"{row['teacher_evaluations']:,}"]
            for key in ("gap_closed", "gap_closed_from_negatives"):
                for omega in omegas:
                    value, error = row.get(f"{key}_{omega:g}"), row.get(f"{key}_{omega:g}_se")
                    cells.append("diverged" if value is None else f"{value:.3f} ± {error:.3f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def page(rows: list[dict], sizes, made: str) -> str:
    return f"""# What closes the gap

`python benchmarks/ablation.py`, {made}. Written by the command.

Gap closed on the toy, on {sizes.gap_captions} held-out captions: away from the empty prompt, and from negative prompts
that were not trained with. Unless its line says otherwise a variant has the largest width within 5 % of the base's
parameters, {sizes.iterations} iterations of batch 16 on recorded batches, each used 4 times, {CAPTIONS} captions and a
learning rate of 2e-3 (`scale`: 2e-2). The error is over captions and noise; one adapter was trained per variant. What
can't hear the negative prompt was trained with empty ones.

{table(rows, sizes.gap_omegas)}"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="those whose section and name have one of these")
    parser.add_argument("--quick", action="store_true", help="a few variants, hardly trained: shows that it runs")
    parser.add_argument("--work", type=Path, help="what is kept; default: build/ablation, or build/ablation-quick")
    parser.add_argument(
        "--results", type=Path, help="where to write ablation.md and .json; default: results, unless quick"
    )
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of every training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks import lab

    sizes = dataclasses.replace(lab.Sizes(), iterations=args.iterations, captions=CAPTIONS, gap_captions=32)
    if args.quick:
        sizes = dataclasses.replace(lab.QUICK, captions=CAPTIONS)
    work = lab.Work(args.work or Path("build") / ("ablation-quick" if args.quick else "ablation"))
    asked = args.only or (["as published", "kinds"] if args.quick else [""])
    chosen = [v for v in variants(sizes.iterations) if any(a.lower() in f"{v.section} {v.name}".lower() for a in asked)]
    if not chosen:
        sys.exit(f"No variant has {' or '.join(asked)} in its name or section.")
    own, rows = lab.Lab(work, sizes), []
    for variant in chosen:
        few = (
            own
            if variant.captions == sizes.captions
            else lab.Lab(work, dataclasses.replace(sizes, captions=variant.captions))
        )
        rows.append(measure(few, variant))
        print(json.dumps(rows[-1]), flush=True)
    text = page(rows, sizes, made_on(args.device))
    print(text)
    results = args.results or (None if args.quick or args.only else RESULTS)
    if results:
        write(results, "ablation", text, rows)
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()

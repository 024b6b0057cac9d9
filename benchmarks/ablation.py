"""Which parts of an adapter and of its training close the gap, and what it takes: parameters, iterations, prompts.

    python benchmarks/ablation.py [--quick] [--only VARIANT ...] [--work DIR] [--json FILE] [--device cuda]

Every variant is trained on the toy with the same captions, seeds and recorded teacher, but for what it is about, and
measured on held-out captions, once away from the empty prompt and once from negative prompts that no training had.
Trained adapters and rows are kept in the work folder: the command goes on where it was stopped, and writes ablation.md
and ablation.json with all rows that are there. One adapter per variant; `quality.py` says what a gap is worth in
pictures.
"""

import argparse
import dataclasses
import functools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.benchmarks.output import made_on, publish, with_errors

ITERATIONS, CAPTIONS = 300, 1000
# The settings in which ours differ from the paper's, as `methods.PAPER_SETTINGS` has them.
SWITCHES = {
    "gain": "gain",
    "log omega": "omega_embedding",
    "one encoder": "shared_encoder",
    "balanced loss": "loss",
    "log-uniform omega": "omega_sampling",
}


# How a table shows what rows and files have other names for: it is not the authors' own adapter (docs/method.md).
SHOWN = {
    "Switches of the paper's cross-attention": "Switches of our re-implementation of the paper's cross-attention",
    "as published": "the paper's settings",
}


@dataclass(frozen=True)
class Variant:
    """An adapter to train, unless told otherwise `delta` alone. `settings` are the trainer's; `percent` of the base's
    parameters sets its width; `width` is that of the only adapter layers it is for."""

    section: str
    name: str
    settings: dict = field(default_factory=dict)
    percent: float = 5.0
    captions: int = CAPTIONS
    width: int | None = None

    @property
    def hears_negative(self) -> bool:
        return KINDS[self.settings.get("kind", "delta")].uses_negative

    @property
    def stem(self) -> str:
        """Of its files."""
        return "-".join(f"{self.section} {self.name}".replace("%", "pct").replace(",", "").split()).lower()


def variants(iterations: int) -> list[Variant]:
    """In the order of the tables."""
    from comfyui_agd.benchmarks.methods import PAPER_SETTINGS, SMALL_ENCODERS

    def ours(section: str, name: str, percent: float = 5.0, captions: int = CAPTIONS, width=None, **settings):
        return Variant(section, name, settings, percent, captions, width)

    section, kind = "Switches of the paper's cross-attention", {"kind": "cross_attention"}
    found = [ours(section, "as published", **kind, **PAPER_SETTINGS)]
    for name, switch in SWITCHES.items():
        rest = {setting: value for setting, value in PAPER_SETTINGS.items() if setting != switch}
        found += [ours(section, f"{name} alone", **kind, **rest)]
    found += [ours(section, "all of them", **kind)]
    section = "Kinds, with all switches"
    found += [
        ours(section, "offset", kind="offset"),
        ours(section, "low_rank without m", kind="low_rank", modulated=False),
        ours(section, "low_rank", kind="low_rank", modulated=True),
        ours(section, "scale", kind="scale", learning_rate=2e-2),
        ours(section, "delta"),
        *(ours(section, f"delta with rank {rank}", rank=rank) for rank in (2, 4, 8)),
        *(ours(section, f"delta with rank {rank} and m", rank=rank, modulated=True) for rank in (2, 4)),
    ]
    section = "delta, without one of them"
    for name, switch in SWITCHES.items():
        if switch != "shared_encoder":  # delta has no other
            found += [ours(section, f"without {name}", **{switch: PAPER_SETTINGS[switch]})]
    section = "delta, more"
    found += [
        ours(section, "half on policy", on_policy=0.5),
        ours(section, "only the 4 deep sites", width=128),
        ours(section, "only the 3 outer sites", width=64),
    ]
    for kind in ("cross_attention", "low_rank", "delta"):
        for percent, width in SMALL_ENCODERS.items():
            how = {"kind": kind, "encoder_width": width, "modulated": True}
            found += [ours("Parameters", f"{kind}, {percent} %", percent, **how)]
    found += [ours("Parameters", "delta, 10 %", 10.0)]
    for factor in (1 / 3, 3):
        count = max(1, round(iterations * factor))
        found += [ours("Iterations", f"delta, {count} iterations", iterations=count)]
    for reuse in (1, 12):
        found += [ours("Teacher evaluations", f"delta, each state {reuse} times", reuse=reuse)]
    return found + [ours("Prompts", f"delta, {n} captions", captions=n) for n in (10, 50, 200)]


def measure(lab, variant: Variant) -> dict:
    """Train it, unless it is there, and measure."""
    from comfyui_agd.agd_core import adapter_file
    from comfyui_agd.benchmarks import methods, metrics

    settings = {"kind": "delta", "rank": 0, "encoder_width": 32} | variant.settings
    hidden = methods.widest(lab, settings, variant.percent, variant.width)
    config = lab.train_config(**settings, hidden=hidden)
    only = {"width": variant.width} if variant.width else {}
    how = (lab, variant.stem, config, lab.prompts(negatives=variant.hears_negative), [], methods.train_adapter)
    score, file = methods.trained(*how, **only)
    row = {"section": variant.section, "variant": variant.name, "iterations": config.iterations}
    row |= {"teacher_evaluations": 2 * config.batch * -(-config.iterations // config.reuse), "model": "toy"}
    if score is None:  # it diverged
        return row | {"parameters_percent": None}
    info, state = adapter_file.load_state(file)
    ready = methods.measured(lab, lab.parts.model, info, state, {"weights": methods.checksum(file)})
    row["parameters_percent"] = round(100 * ready.parameters / lab.base_parameters, 2)
    for key, negatives in (("gap_closed", False), ("gap_closed_from_negatives", True)):
        closed = lab.gap(variant.stem, ready, negatives)["gap_closed"]
        for omega, blocks in zip(lab.sizes.gap_omegas, closed, strict=True):
            row |= with_errors({f"{key}_{omega:g}": metrics.mean_and_error(blocks)})
    return row


def tables(rows: list[dict], omegas: tuple[float, ...]) -> str:
    """Markdown, a table per section."""
    from comfyui_agd.benchmarks.report import table

    columns = [(f"gap at {omega:g}", f"gap_closed_{omega:g}", 1, 3) for omega in omegas]
    columns += [(f"from negatives, {omega:g}", f"gap_closed_from_negatives_{omega:g}", 1, 3) for omega in omegas]
    first = {
        "variant": lambda row: _shown(row["variant"]) + ("" if row["parameters_percent"] else " (diverged)"),
        "parameters, %": lambda row: str(row["parameters_percent"]),
        "iterations": lambda row: str(row["iterations"]),
        "teacher evaluations": lambda row: f"{row['teacher_evaluations']:,}",
    }
    parts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        own = [row for row in rows if row["section"] == section]
        parts.append(f"## {_shown(section)}\n\n{table(own, columns, first)}\n")
    return "\n".join(parts)


def _shown(name: str) -> str:
    return SHOWN.get(name, name)


def page(rows: list[dict], sizes, made: str) -> str:
    return f"""# What closes the gap

`python benchmarks/ablation.py`, {made}. Written by the command.

Gap closed on the toy, on {sizes.gap_captions} held-out captions: away from the empty prompt, and from negative prompts
that were not trained with. Unless its line says otherwise a variant has the largest width within 5 % of the base's
parameters, {sizes.iterations} iterations of batch 16 on recorded batches, each used 4 times, {CAPTIONS} captions and a
learning rate of 2e-3 (`scale`: 2e-2). The error is over captions and noise; one adapter was trained per variant. What
ignores the negative prompt was trained with empty ones. The paper's adapters are re-implementations, which differ from
the authors' own in size and form ([method.md](../../docs/method.md#the-papers-adapters-re-implemented)). All of this is
of one base, the toy.

{tables(rows, sizes.gap_omegas)}"""


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
    known = variants(sizes.iterations)
    chosen = [v for v in known if any(a.lower() in f"{v.section} {v.name}".lower() for a in asked)]
    if not chosen:
        sys.exit(f"No variant has {' or '.join(asked)} in its name or section.")
    lab_of = functools.cache(lambda captions: lab.Lab(work, dataclasses.replace(sizes, captions=captions)))
    for variant in chosen:
        row = measure(lab_of(variant.captions), variant)
        work.save_rows(variant.stem, [row])
        print(json.dumps(row), flush=True)
    rows = work.rows(variant.stem for variant in known)
    publish(args, "ablation", page(rows, sizes, made_on(args.device)), rows)


if __name__ == "__main__":
    main()

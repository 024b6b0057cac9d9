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
from dataclasses import dataclass, field

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.benchmarks.command_line import add_results, add_work, benchmark_parser, selected, work_path
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.output import Figure, columns_of, publish, tables_by_section, with_errors
from comfyui_agd.examples.toy.tables import Column

ITERATIONS, CAPTIONS = 300, 1000
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # that the paper's own adapters are trained with
# The settings that our adapters after the paper's can have otherwise, as `methods.PLAIN_SETTINGS` has them.
SWITCHES = {
    "gain": "gain",
    "log omega": "omega_embedding",
    "one encoder": "shared_encoder",
    "balanced loss": "loss",
    "log-uniform omega": "omega_sampling",
}


@dataclass(frozen=True)
class Variant:
    """An adapter to train, by default `delta` alone. `settings` are the trainer's; `percent` of the base's parameters
    sets its width; `width` is that of the only adapter layers it is for."""

    section: str
    name: str
    settings: dict = field(default_factory=dict)
    percent: float = 5.0
    captions: int = CAPTIONS
    width: int | None = None

    @property
    def uses_negative(self) -> bool:
        return KINDS[self.settings.get("kind", "delta")].guides_attention

    @property
    def full_name(self) -> str:
        return f"{self.section} {self.name}"

    @property
    def stem(self) -> str:
        """Of its files."""
        return "-".join(self.full_name.replace("%", "pct").replace(",", "").split()).lower()


def variants(iterations: int) -> list[Variant]:
    """In the order of the tables."""
    return [*authors(), *switches(), *kinds(), *without_switches(), *more(), *parameters(), *trainings(iterations)]


def authors() -> list[Variant]:
    """The paper's own, with their loss, at each learning rate that is tried."""
    from comfyui_agd.benchmarks.methods import AUTHORS

    return [
        Variant("The paper's own adapters", f"{kind}, learning rate {rate:g}", settings | {"learning_rate": rate})
        for kind, settings in AUTHORS.items()
        for rate in RATES
    ]


def switches() -> list[Variant]:
    from comfyui_agd.benchmarks.methods import PLAIN_SETTINGS

    section, kind = "Switches of our cross-attention", {"kind": "cross_attention"}
    found = [Variant(section, "none of them", kind | PLAIN_SETTINGS)]
    for name, switch in SWITCHES.items():
        rest = {setting: value for setting, value in PLAIN_SETTINGS.items() if setting != switch}
        found.append(Variant(section, f"{name} alone", kind | rest))
    return [*found, Variant(section, "all of them", kind)]


def kinds() -> list[Variant]:
    section = "Kinds, with all switches"
    return [
        Variant(section, "offset", {"kind": "offset"}),
        Variant(section, "low_rank without m", {"kind": "low_rank", "modulated": False}),
        Variant(section, "low_rank", {"kind": "low_rank", "modulated": True}),
        Variant(section, "scale", {"kind": "scale", "learning_rate": 2e-2}),
        Variant(section, "delta"),
        *(Variant(section, f"delta with rank {rank}", {"rank": rank}) for rank in (2, 4, 8)),
        *(Variant(section, f"delta with rank {rank} and m", {"rank": rank, "modulated": True}) for rank in (2, 4)),
    ]


def without_switches() -> list[Variant]:
    from comfyui_agd.benchmarks.methods import PLAIN_SETTINGS

    return [
        Variant("delta, without one of them", f"without {name}", {switch: PLAIN_SETTINGS[switch]})
        for name, switch in SWITCHES.items()
        if switch != "shared_encoder"  # delta has no other
    ]


def more() -> list[Variant]:
    section = "delta, more"
    return [
        Variant(section, "half on policy", {"on_policy": 0.5}),
        Variant(section, "only the 4 deep sites", width=128),
        Variant(section, "only the 3 outer sites", width=64),
    ]


def parameters() -> list[Variant]:
    from comfyui_agd.benchmarks.methods import SMALL_ENCODERS

    found = []
    for kind in ("cross_attention", "low_rank", "delta"):
        for percent, width in SMALL_ENCODERS.items():
            settings = {"kind": kind, "encoder_width": width, "modulated": True}
            found.append(Variant("Parameters", f"{kind}, {percent} %", settings, percent))
    return [*found, Variant("Parameters", "delta, 10 %", percent=10.0)]


def trainings(iterations: int) -> list[Variant]:
    """More and less of what a training costs."""
    counts = [max(1, round(iterations * factor)) for factor in (1 / 3, 3)]
    return [
        *(Variant("Iterations", f"delta, {count} iterations", {"iterations": count}) for count in counts),
        *(Variant("Teacher evaluations", f"delta, each state {n} times", {"reuse": n}) for n in (1, 12)),
        *(Variant("Prompts", f"delta, {n} captions", captions=n) for n in (10, 50, 200)),
    ]


def training_task(experiment, variant: Variant):
    from comfyui_agd.benchmarks import methods

    settings = {"kind": "delta", "rank": 0, "encoder_width": 32} | variant.settings
    hidden = methods.widest(experiment, settings, variant.percent, variant.width)
    prompts = experiment.prompts(negatives=variant.uses_negative)
    config = experiment.train_config(**methods.sized(settings, hidden))
    return methods.TrainingTask(variant.stem, config, prompts, [], variant.width)


def measure(experiment, variant: Variant) -> dict:
    """Train it, unless it is there, and measure."""
    from comfyui_agd.agd_core import adapter_file
    from comfyui_agd.benchmarks import methods, metrics

    task = training_task(experiment, variant)
    score, file = methods.trained(experiment, task, methods.train_adapter)
    row = {"section": variant.section, "variant": variant.name, "iterations": task.config.iterations}
    batches = -(-task.config.iterations // task.config.reuse)
    row |= {"teacher_evaluations": 2 * task.config.batch * batches, "model": "toy"}
    if score is None:  # it diverged
        return row | {"parameters_percent": None}
    info, weights = adapter_file.load_weights(file)
    identity = {"weights": methods.checksum(file)}
    method = methods.prepared(experiment, experiment.parts.model, info, weights, identity)
    row["parameters_percent"] = round(100 * method.parameters / experiment.base_parameters, 2)
    for key, negatives in (("gap_closed", False), ("gap_closed_from_negatives", True)):
        closed = experiment.gap(variant.stem, method, negatives)["gap_closed"]
        for omega, blocks in zip(experiment.sizes.gap_omegas, closed, strict=True):
            row |= with_errors({f"{key}_{omega:g}": metrics.mean_and_error(blocks)})
    return row


def tables(rows: list[dict], omegas: tuple[float, ...]) -> str:
    """Markdown, a table per section."""
    figures = [Figure(f"gap at {omega:g}", f"gap_closed_{omega:g}") for omega in omegas]
    figures += [Figure(f"from negatives, {omega:g}", f"gap_closed_from_negatives_{omega:g}") for omega in omegas]
    columns = [
        Column("variant", lambda row: row["variant"] + ("" if row["parameters_percent"] else " (diverged)")),
        Column("parameters, %", lambda row: str(row["parameters_percent"])),
        Column("iterations", lambda row: str(row["iterations"])),
        Column("teacher evaluations", lambda row: f"{row['teacher_evaluations']:,}"),
        *columns_of(figures),
    ]
    return tables_by_section(rows, lambda own: columns)


def page(rows: list[dict], sizes, made: str) -> str:
    return f"""# What closes the gap

`python benchmarks/ablation.py`, {made}. Written by the command.

Gap closed on the toy, on {sizes.gap_captions} held-out captions: away from the empty prompt, and from negative prompts
that were not trained with. Unless its line says otherwise a variant has the largest width within 5 % of the base's
parameters, {sizes.iterations} iterations of batch 16 on recorded batches, each used 4 times, {CAPTIONS} captions and a
learning rate of 2e-3 (`scale`: 2e-2). The error is over captions and noise; one adapter was trained per variant. What
ignores the negative prompt was trained with empty ones. The paper's own adapters, `paper_attention` and
`paper_additive` ([method.md](../../docs/method.md)), have their authors' loss and uniform omega. All of this is of one
base, the toy.

{tables(rows, sizes.gap_omegas)}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="a few variants, hardly trained: shows that it runs")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="those whose section and name have one of these")
    add_work(parser, "ablation")
    add_results(parser, "ablation.md and .json")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of every training")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.experiment import QUICK_SIZES, Sizes, ToyExperiment
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    sizes = dataclasses.replace(Sizes(), iterations=args.iterations, captions=CAPTIONS, gap_captions=32)
    if args.quick:
        sizes = dataclasses.replace(QUICK_SIZES, captions=CAPTIONS)
    work, known = WorkFolder(work_path(args, "ablation")), variants(sizes.iterations)
    asked = args.only or (["none of them", "kinds"] if args.quick else [""])
    with_captions = functools.cache(lambda count: ToyExperiment(work, dataclasses.replace(sizes, captions=count)))
    for i in selected([variant.full_name for variant in known], asked, "variant"):
        row = measure(with_captions(known[i].captions), known[i])
        work.save_rows(known[i].stem, [row])
        print(json.dumps(row), flush=True)
    rows = work.rows(variant.stem for variant in known)
    publish(args, "ablation", page(rows, sizes, made_on(args.device)), rows)


if __name__ == "__main__":
    main()

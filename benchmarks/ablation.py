"""Which parts of an adapter and of its training close the gap, and what it takes: parameters, iterations, prompts.

    python benchmarks/ablation.py [--base toy|toy-dit ...] [--quick] [--only VARIANT ...] [--trainings N] [--work DIR]
                                  [--json FILE] [--device cuda]

Every variant is trained on each toy with the same captions, seeds and recorded teacher, but for what it is about, and
measured on held-out captions, once away from the empty prompt and once from negative prompts that no training had; and
by how far its pictures are from CFG's own. Trained adapters and rows are kept in a work folder for each base: the
command goes on where it was stopped, and writes ablation.md and ablation.json, of the toy transformer
ablation-toy-dit.md and .json, with all rows that are there, and ablation-bases.md with both bases side by side.
`quality.py` says what a gap is worth in pictures.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.benchmarks.command_line import (
    TOYS,
    add_results,
    add_toys,
    add_trainings,
    add_work,
    benchmark_parser,
    named_for,
    selected,
    work_path,
)
from comfyui_agd.benchmarks.machine import made_on, today
from comfyui_agd.benchmarks.output import (
    Figure,
    columns_of,
    number,
    over_trainings,
    publish_page,
    results_folder,
    tables_by_section,
    with_errors,
    write_rows,
)
from comfyui_agd.examples.toy.tables import Column, markdown_table

ITERATIONS, CAPTIONS, PICTURES = 300, 1000, 64
_KINDS, _DEFAULT = "Kinds, with all switches", "the default"
_RANKS = {"unet": (2, 4, 8), "transformer": (1, 2)}  # that leave something of the usual share for the rest
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
    sets its width; `width` is that of the only adapter layers it is for; `layout`, of the only bases that it has a
    place in."""

    section: str
    name: str
    settings: dict = field(default_factory=dict)
    percent: float = 5.0
    captions: int = CAPTIONS
    width: int | None = None
    layout: str | None = None

    @property
    def uses_negative(self) -> bool:
        return KINDS[self.settings.get("kind", "delta")].Config().uses_negative

    @property
    def full_name(self) -> str:
        return f"{self.section} {self.name}"

    @property
    def stem(self) -> str:
        """Of its files."""
        return "-".join(self.full_name.replace("%", "pct").replace(",", "").split()).lower()


def variants(iterations: int, layout: str) -> list[Variant]:
    """That have a place in bases of this layout, in the order of the tables."""
    known = [*authors(), *switches(), *kinds(layout), *without_switches(), *more(), *parameters()]
    known += [*trainings(iterations), *usual_training(iterations, layout)]
    return [variant for variant in known if variant.layout in (None, layout)]


def authors() -> list[Variant]:
    """The paper's own, with their loss, at each learning rate that is tried."""
    from comfyui_agd.benchmarks.methods import AUTHORS

    section = "The paper's own adapters"
    return [
        Variant(section, f"{kind}, learning rate {rate:g}", settings | {"learning_rate": rate}, layout="unet")
        for kind, settings in AUTHORS.items()
        for rate in RATES
    ]


def switches() -> list[Variant]:
    from comfyui_agd.benchmarks.methods import PLAIN_SETTINGS

    section, kind = "Switches of our cross-attention", {"kind": "cross_attention"}
    found = {"none of them": kind | PLAIN_SETTINGS}
    for name, switch in SWITCHES.items():
        rest = {setting: value for setting, value in PLAIN_SETTINGS.items() if setting != switch}
        found[f"{name} alone"] = kind | rest
    return [
        Variant(section, name, settings, layout="unet") for name, settings in (found | {"all of them": kind}).items()
    ]


def default(layout: str) -> Variant:
    """That of AGD Train for such a base, at the toys' size."""
    from comfyui_agd.benchmarks.methods import settings_in

    return Variant(_KINDS, _DEFAULT, settings_in(layout))


def kinds(layout: str) -> list[Variant]:
    ranks, usual = _RANKS[layout], default(layout)
    of_rank = [Variant(_KINDS, f"delta with rank {rank}", {"rank": rank}) for rank in ranks]
    return [
        Variant(_KINDS, "offset", {"kind": "offset"}, layout="unet"),
        Variant(_KINDS, "low_rank without m", {"kind": "low_rank", "modulated": False}),
        Variant(_KINDS, "low_rank", {"kind": "low_rank", "modulated": True}),
        Variant(_KINDS, "scale", {"kind": "scale", "learning_rate": 2e-2}),
        Variant(_KINDS, "delta"),
        usual,
        *(variant for variant in of_rank if {"kind": "delta"} | variant.settings != usual.settings),
        *(Variant(_KINDS, f"delta with rank {rank} and m", {"rank": rank, "modulated": True}) for rank in ranks[:2]),
        Variant(_KINDS, "delta with a vector of 32", {"vector": 32}, layout="transformer"),
        *(in_some_blocks(usual) if layout == "transformer" else ()),  # in the toy UNet's stacks is one block each
    ]


def in_some_blocks(usual: Variant) -> list[Variant]:
    """The default with its `delta` in one of so many blocks."""
    return [
        Variant(_KINDS, f"delta in one of {n} blocks, with all else", usual.settings | {"attention_every": n})
        for n in (2, 3, 6)
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
        Variant(section, "only the 4 deep sites", width=128, layout="unet"),
        Variant(section, "only the 3 outer sites", width=64, layout="unet"),
    ]


def parameters() -> list[Variant]:
    from comfyui_agd.benchmarks.methods import SMALL_ENCODERS

    found = []
    for kind in ("cross_attention", "low_rank", "delta"):
        for percent, width in SMALL_ENCODERS.items():
            settings = {"kind": kind, "encoder_width": width, "modulated": True}
            layout = "unet" if kind == "cross_attention" else None
            found.append(Variant("Parameters", f"{kind}, {percent} %", settings, percent, layout=layout))
    return [*found, Variant("Parameters", "delta, 10 %", percent=10.0)]


def trainings(iterations: int) -> list[Variant]:
    """More and less of what a training costs."""
    counts = [max(1, round(iterations * factor)) for factor in (1 / 3, 3)]
    return [
        *(Variant("Iterations", f"delta, {count} iterations", {"iterations": count}) for count in counts),
        *(Variant("Teacher evaluations", f"delta, each state {n} times", {"reuse": n}) for n in (1, 12)),
        *(Variant("Prompts", f"delta, {n} captions", captions=n) for n in (10, 50, 200)),
    ]


def usual_training(iterations: int, layout: str) -> list[Variant]:
    """The default adapter, for as many teacher evaluations trained in other ways."""
    changed = {
        "each state 8 times, twice the iterations": {"reuse": 8, "iterations": 2 * iterations},
        "each state 12 times, three times the iterations": {"reuse": 12, "iterations": 3 * iterations},
        "omega up to 8": {"omega_max": 8.0},
        "omega up to 12": {"omega_max": 12.0},
        "the last quarter on policy": {"on_policy": 1.0, "on_policy_from": 0.75},
    }
    usual = default(layout).settings
    return [Variant("Other trainings", name, usual | settings) for name, settings in changed.items()]


def training_task(experiment, variant: Variant):
    from comfyui_agd.benchmarks import methods

    settings = {"kind": "delta", "rank": 0, "encoder_width": 32} | variant.settings
    hidden = methods.widest(experiment, settings, variant.percent, variant.width)
    prompts = experiment.prompts(negatives=variant.uses_negative)
    config = experiment.train_config(**methods.sized(settings, hidden))
    return methods.TrainingTask(label(experiment, variant), config, prompts, [], variant.width)


def label(experiment, variant: Variant) -> str:
    """Of the files of one of its trainings."""
    return f"{variant.stem}-seed{seed}" if (seed := experiment.training_seed) else variant.stem


def trained_method(experiment, variant: Variant):
    """(the training's config, the method): trained, unless it is there; no method where it diverged."""
    from comfyui_agd.agd_core import adapter_file
    from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
    from comfyui_agd.benchmarks import methods

    task = training_task(experiment, variant)
    score, file = methods.trained(experiment, task, methods.train_adapter)
    if score is None:
        return task.config, None
    info, weights = adapter_file.load_weights(file)
    model = experiment.parts.model
    if variant.width is None:
        model = apply_adapter(model, info, weights, source=file.name)
    return task.config, methods.prepared(experiment, model, info, weights, {"weights": methods.checksum(file)})


def measure(with_captions: Callable, variant: Variant, seed: int, usual: Variant) -> dict:
    """Train it, unless it is there, and measure. `with_captions(count)`: the experiment that trains with so many;
    `usual`: what it is compared with."""
    from comfyui_agd.benchmarks.experiment import SampledAt

    experiment = with_captions(variant.captions).of_training(seed)
    config, method = trained_method(experiment, variant)
    row = {"section": variant.section, "variant": variant.name, "iterations": config.iterations}
    batches = -(-config.iterations // config.reuse)
    row |= {"teacher_evaluations": 2 * config.batch * batches, "model": experiment.base.name, "measured": today()}
    if method is None:
        return row | {"parameters_percent": None}
    row["parameters_percent"] = number(100 * method.parameters / experiment.base_parameters)
    usual_method = trained_method(with_captions(usual.captions).of_training(seed), usual)[1]
    compared = {label(experiment, variant): method, label(experiment, usual): usual_method}
    row |= gaps(experiment, compared)
    if variant.width is not None:  # it fits no MODEL, whose layers are all there
        return row
    return row | pictures(experiment, label(experiment, variant), method, SampledAt(3.0))


def gaps(experiment, compared: dict) -> dict:
    """Closed by the first of these methods, by the names of their files, and how much more that is than by the last."""
    from comfyui_agd.benchmarks import metrics

    found = {}
    for key, negatives in (("gap_closed", False), ("gap_closed_from_negatives", True)):
        of_each = [experiment.gap(name, each, negatives)["gap_closed"] for name, each in compared.items()]
        for omega, own, usual in zip(experiment.sizes.gap_omegas, of_each[0], of_each[-1], strict=True):
            found[f"{key}_{omega:g}"] = metrics.mean_and_error(own)
            found[f"{key}_above_default_{omega:g}"] = metrics.mean_and_error(own - usual)
    return with_errors(found)


def pictures(experiment, name: str, method, at) -> dict:
    """How far they are from CFG's own."""
    made = experiment.samples(name, method, at)
    distance = {"distance_to_cfg": experiment.distance_to_cfg(made, at)}
    return {"evaluations": made.evaluations.item() / len(made.correct)} | with_errors(distance)


def cfg_rows(experiment) -> list[dict]:
    """What an adapter's distance is compared with."""
    from comfyui_agd.benchmarks.experiment import SampledAt
    from comfyui_agd.benchmarks.methods import METHODS
    from comfyui_agd.examples.toy.sampling import STEPS

    row = {"section": "CFG itself", "model": experiment.base.name, "measured": today()}
    cfg = METHODS["cfg"].prepare(experiment, "cfg")
    return [
        row | {"variant": f"{steps} steps"} | pictures(experiment, "cfg", cfg, SampledAt(3.0, steps))
        for steps in (STEPS, STEPS // 2)
    ]


def tables(rows: list[dict], omegas: Sequence[float]) -> str:
    """Markdown, a table per section."""
    figures = [
        Figure("trainings", "trainings", 1, 0),
        *(Figure(f"gap at {omega:g}", f"gap_closed_{omega:g}") for omega in omegas),
        *(Figure(f"from negatives, {omega:g}", f"gap_closed_from_negatives_{omega:g}") for omega in omegas),
        _EVALUATIONS,
        _DISTANCE,
    ]
    columns = [
        Column("variant", lambda row: row["variant"] + (" (diverged)" if _diverged(row) else "")),
        *columns_of([Figure("parameters, %", "parameters_percent", 1, 2), Figure("iterations", "iterations", 1, 0)]),
        Column("teacher evaluations", lambda row: f"{row['teacher_evaluations']:,}" if _trained(row) else "–"),
        *columns_of(figures),
        Column("measured", lambda row: row["measured"]),
    ]
    return tables_by_section(rows, lambda own: columns)


_EVALUATIONS = Figure("evaluations per picture", "evaluations", 1, 0)
_DISTANCE = Figure("distance to CFG's picture", "distance_to_cfg")
_COMPARED = (Figure("gap at 3", "gap_closed_3"), Figure("above the default", "gap_closed_above_default_3"), _DISTANCE)


def _trained(row: dict) -> bool:
    """And not CFG's."""
    return "teacher_evaluations" in row


def _diverged(row: dict) -> bool:
    return _trained(row) and row["parameters_percent"] is None


def page(rows: list[dict], experiment, made: str) -> str:
    sizes, base = experiment.sizes, experiment.base
    return f"""# What closes the gap

`python benchmarks/ablation.py --base {base.name}`, {made}. Written by the command. Both bases side by side:
[ablation-bases.md](ablation-bases.md).

Gap closed on {base.title}, on {sizes.gap_captions} held-out captions: away from the empty prompt, and from negative
prompts that were not trained with. Unless its line says otherwise a variant has the largest width within 5 % of the
base's parameters, {sizes.iterations} iterations of batch 16 on recorded batches, each used 4 times, {CAPTIONS} captions
and a learning rate of 2e-3 (`scale`: 2e-2). {_about_default(experiment.model().base.layout)} What ignores the negative
prompt was trained with empty ones. {_ABOUT_ERRORS} The paper's own adapters, `paper_attention` and `paper_additive`
([method.md](../../docs/method.md)), have their authors' loss and uniform omega.

The distance is that of the final latents at omega 3 and 20 steps to CFG's of 50, over the unguided ones', on
{sizes.pictures} captions: 0 is CFG's picture. Too few for accuracy and Fréchet distance: [quality.md](quality.md) has
them of the main variants. Variants for some of the layers only have none, for they fit no model; nor have rows that
were measured before it was.

{tables(rows, sizes.gap_omegas)}
"""


_ABOUT_ERRORS = """Errors are over captions and noise, and, where a variant was trained several times, over trainings;
where it was once they know nothing of other trainings."""


def _about_default(layout: str) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in default(layout).settings.items())
    return f"The default is, in a {layout}: {settings}."


def bases_page(rows: list[dict], experiments, made: str) -> str:
    """ablation-bases.md."""
    of = {(row["model"], row["section"], row["variant"]): row for row in rows}
    names = dict.fromkeys((row["section"], row["variant"]) for row in rows)
    models = [each.base.name for each in experiments]
    columns = [Column("variant", ": ".join)]
    for model in models:
        columns += [
            Column(f"{model}: {figure.heading}", lambda name, m=model, f=figure: f.text(of.get((m, *name), {})))
            for figure in _COMPARED
        ]
    defaults = " ".join(_about_default(each.model().base.layout) for each in experiments)
    return f"""# What closes the gap on each base

`python benchmarks/ablation.py`, {made}. Written by the command, of the rows of [ablation.md](ablation.md) and
[ablation-toy-dit.md](ablation-toy-dit.md).

Gap closed at omega 3, the difference to the default with the same captions and seeds, and the distance to CFG's
picture. What helps is positive in the second column of a base by more than two of its errors.
{defaults}
{_ABOUT_ERRORS} A dash is what was not run there, or has no place there.

{markdown_table(columns, names)}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="a few variants, hardly trained: shows that it runs")
    add_toys(parser)
    add_trainings(parser)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="those whose section and name have one of these")
    add_work(parser, "ablation")
    add_results(parser, "ablation.md and .json, those of the toy transformer, and ablation-bases.md")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of every training")
    return parser.parse_args(argv)


def measure_all(
    with_captions: Callable, known: list[Variant], asked: list[str], trainings: int, usual: Variant
) -> None:
    """Rows of the variants `asked` for, compared with the `usual` one, into the work folder."""
    chosen = [known[i] for i in selected([variant.full_name for variant in known], asked, "variant")]
    experiment = with_captions(CAPTIONS)
    experiment.work.save_rows("cfg", cfg_rows(experiment))
    for variant in chosen:
        row = over_trainings([measure(with_captions, variant, seed, usual) for seed in range(trainings)])
        experiment.work.save_rows(variant.stem, [row])
        print(json.dumps(row), flush=True)


def sizes_of(quick: bool, iterations: int = ITERATIONS):
    """How much is computed."""
    from comfyui_agd.benchmarks.experiment import QUICK_SIZES, Sizes

    if quick:
        return dataclasses.replace(QUICK_SIZES, captions=CAPTIONS, pictures=2)
    return Sizes(pictures=PICTURES, iterations=iterations, captions=CAPTIONS, gap_captions=32)


def experiment_with(work, sizes, base: str, captions: int):
    from comfyui_agd.benchmarks.experiment import ToyExperiment

    return ToyExperiment(work, dataclasses.replace(sizes, captions=captions), base)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    use_comfyui(cpu=args.device == "cpu")
    from comfyui_agd.benchmarks.work_folder import WorkFolder

    sizes = sizes_of(args.quick, args.iterations)
    asked = args.only or (["the default", "delta, without"] if args.quick else [""])
    experiments, rows = [], []
    for base in TOYS:
        work = WorkFolder(work_path(args, "ablation", base))
        with_captions = functools.cache(functools.partial(experiment_with, work, sizes, base))
        experiments.append(with_captions(CAPTIONS))
        layout = experiments[-1].model().base.layout
        known = variants(sizes.iterations, layout)
        if base in args.base:
            measure_all(with_captions, known, asked, args.trainings, default(layout))
        rows += work.rows(["cfg", *(variant.stem for variant in known)])
    publish(args, experiments, rows)


def publish(args: argparse.Namespace, experiments, rows: list[dict]) -> None:
    """A page for each base that there are rows of, and the one of both."""
    made = made_on(args.device)
    for experiment in experiments:
        name = experiment.base.name
        if own := [row for row in rows if row["model"] == name]:
            publish_page(args, named_for("ablation", name), page(own, experiment, made), own)
    print(text := bases_page(rows, experiments, made))
    if folder := results_folder(args):
        (folder / "ablation-bases.md").write_text(text)
    if args.json:
        write_rows(args.json, rows)


if __name__ == "__main__":
    main()

"""What an adapter adds to a step, and what distilling it takes, at the true sizes of the bases: counted, not timed.

    python benchmarks/step_cost.py [--quick] [--only MODEL ...] [--json FILE]

Nothing is computed, whatever the `--device`: the models are on the meta device. A step takes arithmetic, memory
traffic, and on a GPU one launch for every operation: all three are counted, as they are without torch.compile, whose
graphs have the same arithmetic, fewer launches, and less traffic where it joins operations. What is needed once per
sampling, the keys and values of the prompts, is listed apart. Further tables are of the plan of `agd train` for a card
of 24 GB, and of a training step for one state. With --only the page's other rows stay.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_results, benchmark_parser, selected
from comfyui_agd.benchmarks.inference import ADAPTERS
from comfyui_agd.benchmarks.machine import made_on
from comfyui_agd.benchmarks.meta_model import MetaModel
from comfyui_agd.benchmarks.output import results_folder, write_page, write_rows
from comfyui_agd.examples.toy.tables import Column, console_table, markdown_table
from comfyui_agd.training.progress import duration

# What distilling takes is planned with the base's weights in these dtypes.
BASE_DTYPES = ("bf16", "fp8")
CARD = "24 GB"


@dataclass(frozen=True)
class Card:
    """`memory`: its name among AGD Train's cards; `rate`: dense half-precision FLOP/s with fp32 sums, by its maker."""

    model: str
    memory: str
    rate: float

    @property
    def name(self) -> str:
        return f"{self.model}, {self.memory}"


CARDS = (
    Card("RTX 3060", "12 GB", 25e12),
    Card("RTX 4060 Ti", "16 GB", 44e12),
    Card("RTX 3090", "24 GB", 71e12),
    Card("RTX 4090", "24 GB", 165e12),
    Card("RTX 5090", "32 GB", 210e12),
)
ACHIEVED = 0.4  # of a card's rate: an assumption


@dataclass(frozen=True)
class TrueSize:
    """A base as people sample it: `width` x `height` pixels, and of video so many `frames` of latents."""

    name: str
    width: int
    height: int
    frames: int = 1

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}" + (f", {4 * self.frames - 3} frames" if self.frames > 1 else "")


SIZES = (
    TrueSize("SD 1.5", 512, 512),
    TrueSize("SDXL", 1024, 1024),
    TrueSize("SD3.5 medium", 1024, 1024),
    TrueSize("SD3.5 large", 1024, 1024),
    TrueSize("Z-Image", 1024, 1024),
    TrueSize("Qwen-Image", 1328, 1328),
    TrueSize("Anima", 1024, 1024),
    TrueSize("Wan 2.2 14B", 832, 480),
    TrueSize("Wan 2.2 14B", 832, 480, frames=21),
    TrueSize("HunyuanVideo 1.5", 848, 480),
    TrueSize("HunyuanVideo 1.5", 848, 480, frames=16),
)
_STEP = (
    Column("model", lambda row: row["model"], -17),
    Column("size", lambda row: row["size"], 20),
    Column("  method", lambda row: f"  {row['method']}", -16),
    Column("parameters", lambda row: f"{row['parameters']:,}", 12),
    Column("FLOPs", lambda row: f"{row['added_per_step']:+.2%}", 8),
    Column("launches", lambda row: f"{row['added_launches']:+d}, {_share_of_launches(row):+.1%}", 16),
    Column("bytes", lambda row: f"{row['added_bytes']:+.2%}", 8),
    Column("FLOPs per sampling", lambda row: f"{row['added_per_sampling']:+.2%}", 20),
    Column("launches per sampling", lambda row: f"{row['launches_per_sampling']:+d}", 22),
)
_SPENT = (
    Column("model", lambda row: row["model"], -17),
    Column("  method", lambda row: f"  {row['method']}", -16),
    Column("launches added to a step", lambda row: _spent(row["launches_by_operation"]), 60),
)
_TRAINING = (
    Column("model", lambda row: row["model"], -17),
    Column("size", lambda row: row["size"], 20),
    Column("base, B parameters", lambda row: f"{row['base_parameters'] / 1e9:.2f}", 20),
    Column("TFLOP per evaluation", lambda row: f"{row['unguided_flops'] / 1e12:.1f}", 22),
    *(Column(f"{dtype} base on {CARD}", lambda row, dtype=dtype: row[f"fits_{dtype}"], 44) for dtype in BASE_DTYPES),
)


_ON_CARDS = (
    Column("model", lambda row: row["model"], -17),
    Column("size", lambda row: row["size"], 20),
    *(Column(card.name, lambda row, name=card.name: row["cards"][name], 44) for card in CARDS),
)
_PEAKS = (
    Column("model", lambda row: row["model"], -17),
    Column("size", lambda row: row["size"], 20),
    Column("kept, GB", lambda row: f"{row['step_bytes'] / 1e9:.1f}", 10),
    Column("computed twice, GB", lambda row: f"{row['step_bytes_checkpointed'] / 1e9:.1f}", 20),
    Column("kept, x FLOPs", lambda row: f"{row['step_flops'] / row['unguided_flops']:.1f}", 15),
    Column("computed twice, x FLOPs", lambda row: f"{row['step_flops_checkpointed'] / row['unguided_flops']:.1f}", 24),
)


def _share_of_launches(row: dict) -> float:
    return row["added_launches"] / row["unguided_launches"]


def _spent(launches: dict[str, int]) -> str:
    """ "32 mm, 11 silu, ...", most first."""
    names = sorted(launches, key=lambda name: (-launches[name], name))
    return ", ".join(f"{launches[name]} {name.strip('_').removesuffix('_for_cpu')}" for name in names)


def default_of(base) -> dict:
    """The adapter that `agd train` makes by default, as settings of its kind."""
    from comfyui_agd.agd_core.kinds import KINDS
    from comfyui_agd.training.presets import settings_for

    config = settings_for(base, {})
    own = {f.name for f in fields(KINDS[config.kind].Config)}
    return {"kind": config.kind, **{key: value for key, value in asdict(config.kind_config()).items() if key in own}}


def adapters_of(base) -> dict[str, dict]:
    """By name: on UNets those that `inference.py` times, on transformers the default and its parts."""
    if base.layout == "unet":
        return ADAPTERS
    default = default_of(base)
    return {
        "low_rank": {"kind": "low_rank", "rank": 16},
        "low_rank, vector": {"kind": "low_rank", "rank": 16, "vector": default["vector"]},
        "default": default,
    }


def configs_of(base, adapters: dict[str, dict]) -> dict:
    """The adapters on this base, of which `adapters` has the settings by name."""
    from comfyui_agd.agd_core.config import AdapterConfig
    from comfyui_agd.agd_core.kinds import kind_config

    kinds = {method: kind_config(**settings) for method, settings in adapters.items()}
    shape = {"vector": base.vector, "time_channels": base.time_channels}
    return {method: AdapterConfig(kind.layers_of(base), kind, **shape) for method, kind in kinds.items()}


def count(at: TrueSize, adapters: dict[str, dict] | None = None) -> list[dict]:
    """A row per adapter: of `adapters`, settings by name, or those that suit the base."""
    from comfyui_agd.agd_core.adapter import Adapter

    model = MetaModel(at.name, frames=at.frames)
    shape = model.latent_shape(at.width, at.height)
    unguided, rows = model.cost(shape, None, 1), []
    for method, config in configs_of(model.base, adapters or adapters_of(model.base)).items():
        one, two = (model.cost(shape, config, steps) for steps in (1, 2))
        with torch.device("meta"):
            parameters = Adapter(config).parameter_count()
        row = {"model": at.name, "size": at.size, "method": method, "parameters": parameters}
        rows.append(row | {"base_parameters": model.parameters()} | added(unguided, one, two))
    return rows


def added(unguided, one, two) -> dict:
    """To a step, and once to a sampling: `one` and `two` are of samplings of so many steps, all three as `Traced`."""
    step = {
        name: two.launches[name] - one.launches.get(name, 0) - unguided.launches.get(name, 0) for name in two.launches
    }
    launches, of_one, of_two = (sum(each.launches.values()) for each in (unguided, one, two))
    return {
        "unguided_flops": unguided.flops,
        "unguided_launches": launches,
        "unguided_bytes": unguided.moved_bytes,
        "added_per_step": (two.flops - one.flops) / unguided.flops - 1,
        "added_launches": of_two - of_one - launches,
        "launches_by_operation": {name: count for name, count in step.items() if count},
        "added_bytes": (two.moved_bytes - one.moved_bytes) / unguided.moved_bytes - 1,
        "added_per_sampling": (2 * one.flops - two.flops) / unguided.flops,
        "launches_per_sampling": 2 * of_one - of_two,
    }


def planned(at: TrueSize) -> dict:
    """How distilling the default adapter fits into the card, by the base's dtype, and a base in bf16 into others."""
    from comfyui_agd.training.presets import CARDS as BUDGETS

    models = {dtype: MetaModel(at.name, dtype, at.frames) for dtype in BASE_DTYPES}
    found = {f"fits_{dtype}": _fits(_plan(model, at, BUDGETS[CARD])) for dtype, model in models.items()}
    return found | {"cards": {card.name: _on_card(models["bf16"], at, card) for card in CARDS}}


def _plan(model: MetaModel, at: TrueSize, gigabytes: float, rate: float = 0.0):
    """None where it does not fit. `rate`: FLOP/s, which the plan's seconds go by."""
    from comfyui_agd.training.plan import DoesNotFit, ExamplePrompts, plan
    from comfyui_agd.training.presets import settings_for

    config = settings_for(model.base, {"width": at.width, "height": at.height})
    model.memory.matmul_rate = lambda: rate
    try:
        return plan(model, config, int(gigabytes * 1e9), ExamplePrompts(model.prompt, model.prompt))
    except DoesNotFit:
        return None


def _fits(found) -> str:
    if found is None:
        return "no"
    parts = [f"{found.peak_bytes / 1e9:.1f} GB", f"{found.micro_batch} at once"]
    parts += ["checkpointed"] if found.checkpointing else []
    elsewhere = found.base_bytes - found.base_bytes_on_device
    parts += [f"{elsewhere / 1e9:.1f} of {found.base_bytes / 1e9:.1f} GB offloaded"] if elsewhere > 0 else []
    return ", ".join(parts)


def _on_card(model: MetaModel, at: TrueSize, card: Card) -> str:
    from comfyui_agd.training.presets import CARDS as BUDGETS

    found = _plan(model, at, BUDGETS[card.memory], ACHIEVED * card.rate)
    if found is None:
        return "no"
    moved = ", offloaded" if found.base_bytes > found.base_bytes_on_device else ""
    return f"{found.peak_bytes / 1e9:.1f} GB, {duration(found.seconds)}{moved}"


def peaks(at: TrueSize) -> dict:
    """What a training step of the default adapter takes for one state beside the weights, with a base in bf16."""
    from comfyui_agd.training.presets import settings_for

    model, found = MetaModel(at.name, "bf16", at.frames), {}
    config = settings_for(model.base, {"width": at.width, "height": at.height}).adapter_config(model.base, 77)
    shape = model.latent_shape(at.width, at.height)
    for suffix, checkpointing in (("", False), ("_checkpointed", True)):
        step = model.memory.trace_student(config, shape, 1, checkpointing, model.prompt)
        found |= {f"step_bytes{suffix}": step.peak_bytes, f"step_flops{suffix}": step.flops}
    return found


def with_kept(folder: Path, rows: list[dict]) -> list[dict]:
    """`rows`, and those of the page in `folder` that they don't take the place of, in the order of `SIZES`."""
    file, own = folder / "step_cost.json", {(row["model"], row["size"]) for row in rows}
    kept = json.loads(file.read_text()) if file.exists() else []
    order = {(at.name, at.size): place for place, at in enumerate(SIZES)}
    stay = [row for row in kept if (row["model"], row["size"]) in order.keys() - own]
    return sorted(stay + rows, key=lambda row: order[row["model"], row["size"]])


def page(every: list[dict]) -> str:
    plans = [row for row in every if "step_bytes" in row]
    rows = [row for row in every if "step_bytes" not in row]
    made = "; ".join(dict.fromkeys(row["made"] for row in plans))
    unet = [row for row in rows if row["model"] in ("SD 1.5", "SDXL")]
    return f"""# What a step and a training cost

`python benchmarks/step_cost.py`, {made}. Counted on the meta device at true sizes; no weights, no card.

## Added to a step

FLOPs, kernel launches and bytes that are read and written, over those of one evaluation of the base, in the dtype that
is computed in and without torch.compile. *Per sampling*: once, for the prompts' keys and values.

{markdown_table(_STEP, rows)}

CFG adds 100 % of everything. Launches are operations that do more than look at memory in another way; how many of them
are one kernel depends on the device.

## What the launches are

By the names of PyTorch's operations.

{markdown_table(_SPENT, unet)}

## Distilling the default adapter on a card of {CARD}

By the plan of `agd train`, batch 4: the device's memory at its peak, the base's weights on it included, how many
states at once, and what has to stay in system memory. *no*: not even so.

{markdown_table(_TRAINING, plans)}

## Distilling the default adapter on other cards

**Estimates: nothing of this is measured.** Memory by the plan of `agd train`, with the base in bf16; time from the
FLOPs of the whole training, 1,500 iterations of batch 4, if {ACHIEVED:.0%} of the card's dense half-precision rate are
achieved and moving weights that don't fit takes no time.

{markdown_table(_ON_CARDS, plans)}

## A training step for one state

What the student's forward and backward pass take beside the weights, with a base in bf16 and the default adapter:
memory at its peak, and FLOPs over those of one evaluation of the base. *Kept*: all activations until the backward pass;
*computed twice*: a block's at a time (`--checkpointing`), which is what makes a step fit.

{markdown_table(_PEAKS, plans)}
"""


def main() -> None:
    parser = benchmark_parser(__doc__, quick="SD 1.5 and SD3.5 medium only")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models")
    add_results(parser, "step_cost.md and .json")
    args = parser.parse_args()
    use_comfyui(cpu=True)
    names = [at.name for at in SIZES]
    asked = args.only or (["SD 1.5", "SD3.5 medium"] if args.quick else [""])
    chosen = [SIZES[i] for i in selected(names, asked, "model")]
    rows = []
    for at in chosen:
        own = count(at)
        plan = own[-1] | planned(at) | peaks(at) | {"made": made_on("cpu")}
        tables = ((_STEP, own), (_SPENT, own), (_TRAINING, [plan]), (_ON_CARDS, [plan]), (_PEAKS, [plan]))
        print(*(line for columns, lines in tables for line in console_table(columns, lines)), sep="\n", flush=True)
        rows += [*own, plan]
    if args.json:
        write_rows(args.json, rows)
    if folder := results_folder(args):
        every = with_kept(folder, rows)
        write_page(folder, "step_cost", page(every), every)


if __name__ == "__main__":
    main()

"""What an adapter adds to a step, and what distilling it takes, at the true sizes of the bases: counted, not timed.

    python benchmarks/step_cost.py [--quick] [--only MODEL ...] [--json FILE]

Nothing is computed, whatever the `--device`: the models are on the meta device. A step's time has more in it, on a GPU
above all what launching many small operations costs (`inference.py` measures that). What is needed once per sampling,
the keys and values of the prompts, is listed apart. The second table is the plan of `agd train` for a card of 24 GB,
the third what a training step takes for one state. With --only the page's other rows stay.
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

# What distilling takes is planned with the base's weights in these dtypes.
BASE_DTYPES = ("bf16", "fp8")
CARD = "24 GB"


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
    Column("per step", lambda row: f"{row['added_per_step']:+.2%}", 10),
    Column("per sampling", lambda row: f"{row['added_per_sampling']:+.2%}", 14),
)
_TRAINING = (
    Column("model", lambda row: row["model"], -17),
    Column("size", lambda row: row["size"], 20),
    Column("base, B parameters", lambda row: f"{row['base_parameters'] / 1e9:.2f}", 20),
    Column("TFLOP per evaluation", lambda row: f"{row['unguided_flops'] / 1e12:.1f}", 22),
    *(Column(f"{dtype} base on {CARD}", lambda row, dtype=dtype: row[f"fits_{dtype}"], 44) for dtype in BASE_DTYPES),
)


_PEAKS = (
    Column("model", lambda row: row["model"], -17),
    Column("size", lambda row: row["size"], 20),
    Column("kept, GB", lambda row: f"{row['step_bytes'] / 1e9:.1f}", 10),
    Column("computed twice, GB", lambda row: f"{row['step_bytes_checkpointed'] / 1e9:.1f}", 20),
    Column("kept, x FLOPs", lambda row: f"{row['step_flops'] / row['unguided_flops']:.1f}", 15),
    Column("computed twice, x FLOPs", lambda row: f"{row['step_flops_checkpointed'] / row['unguided_flops']:.1f}", 24),
)


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


def count(at: TrueSize) -> list[dict]:
    """A row per adapter."""
    from comfyui_agd.agd_core.adapter import Adapter
    from comfyui_agd.agd_core.config import AdapterConfig
    from comfyui_agd.agd_core.kinds import kind_config

    model = MetaModel(at.name, frames=at.frames)
    shape = model.latent_shape(at.width, at.height)
    unguided, rows = model.flops(shape, None, 1), []
    for method, settings in adapters_of(model.base).items():
        kind, base = kind_config(**settings), model.base
        config = AdapterConfig(kind.layers_of(base), kind, vector=base.vector, time_channels=base.time_channels)
        one, two = (model.flops(shape, config, steps) for steps in (1, 2))
        with torch.device("meta"):
            parameters = Adapter(config).parameter_count()
        row = {"model": at.name, "size": at.size, "method": method, "parameters": parameters}
        row |= {"base_parameters": model.parameters(), "unguided_flops": unguided}
        rows.append(
            row | {"added_per_step": (two - one) / unguided - 1, "added_per_sampling": (2 * one - two) / unguided}
        )
    return rows


def planned(at: TrueSize) -> dict:
    """How distilling the default adapter fits into the card, by the base's dtype."""
    return {f"fits_{dtype}": _fits(at, dtype) for dtype in BASE_DTYPES}


def _fits(at: TrueSize, dtype: str) -> str:
    from comfyui_agd.training.plan import DoesNotFit, ExamplePrompts, plan
    from comfyui_agd.training.presets import CARDS, settings_for

    model = MetaModel(at.name, dtype, at.frames)
    config = settings_for(model.base, {"width": at.width, "height": at.height})
    try:
        found = plan(model, config, int(CARDS[CARD] * 1e9), ExamplePrompts(model.prompt, model.prompt))
    except DoesNotFit:
        return "no"
    parts = [f"{found.peak_bytes / 1e9:.1f} GB", f"{found.micro_batch} at once"]
    parts += ["checkpointed"] if found.checkpointing else []
    elsewhere = found.base_bytes - found.base_bytes_on_device
    parts += [f"{elsewhere / 1e9:.1f} of {found.base_bytes / 1e9:.1f} GB offloaded"] if elsewhere > 0 else []
    return ", ".join(parts)


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
    return f"""# What a step and a training cost

`python benchmarks/step_cost.py`, {made}. Counted on the meta device at true sizes; no weights, no card.

## Added to a step

FLOPs, over those of one evaluation of the base. *Per sampling*: once, for the prompts' keys and values.

{markdown_table(_STEP, rows)}

## Distilling the default adapter on a card of {CARD}

By the plan of `agd train`, batch 4: the device's memory at its peak, the base's weights on it included, how many
states at once, and what has to stay in system memory. *no*: not even so.

{markdown_table(_TRAINING, plans)}

## A training step for one state

What the student's forward and backward pass take beside the weights, with a base in bf16 and the default adapter:
memory at its peak, and FLOPs over those of one evaluation of the base. *Kept*: all activations until the backward pass;
*computed twice*: a block's at a time (`--checkpointing`), which is what makes a step fit. Where prompt and image share
one attention, the image looks at all keys three times in training.

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
        tables = ((_STEP, own), (_TRAINING, [plan]), (_PEAKS, [plan]))
        print(*(line for columns, lines in tables for line in console_table(columns, lines)), sep="\n", flush=True)
        rows += [*own, plan]
    if args.json:
        write_rows(args.json, rows)
    if folder := results_folder(args):
        every = with_kept(folder, rows)
        write_page(folder, "step_cost", page(every), every)


if __name__ == "__main__":
    main()

"""What a sampling step costs: unguided, with CFG and with AGD, at the true sizes of SD 1.5 and SDXL.

    python benchmarks/inference.py [--device cuda] [--dtype fp16 bf16] [--compile] [--profile] [--quick] [--json FILE]
                                   [--model NAME] [--only METHOD ...] [--minutes N]

Random weights: time and memory do not depend on their values. Every step goes through ComfyUI's own guider, wrappers
and patches. The methods take turns, so that a machine that slows down slows all of them: a few steps each, of which all
but the first are timed, for that one also computes what a whole sampling needs once. Ratios are of medians, with the
quartiles of the ratio to the unguided step of the same round beside them.

`training-free` and the two with EasyCache don't evaluate every step. Which ones they leave out depends on a model's
weights; here they leave out all that they can, and the seconds of both sorts of steps are listed apart. A method that
fails, or that `--minutes` leaves no time for, has a row that says so.

Two figures besides, for adapters whose cost drowns in the noise of a step. `inside`: the share of the step that is
spent in the adapter, timed at its calls in further steps (on a GPU by the device's own clock); the attention to the
negative prompt is the base's own and not inside. `floor`: what must be spent, counted: the FLOPs beyond the unguided
step's, that attention's among them, and the bytes that the adapter moves at least (its weights once; each adapted
layer's input, attention output, sum, and delta).

`--profile`: the kernels of a step and of the adapter in it, and their seconds on the device.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_base, benchmark_parser
from comfyui_agd.benchmarks.kernels import kernels_per_step
from comfyui_agd.benchmarks.machine import device_called, device_name, error_text, release_memory
from comfyui_agd.benchmarks.output import write_rows
from comfyui_agd.benchmarks.random_bases import NAMES, TINY_PIXELS, RandomBase
from comfyui_agd.benchmarks.timed_methods import (
    ADAPTERS,
    CACHED,
    FORCED,
    LOW_RANK_ALONE,
    Clock,
    Method,
    Methods,
    ModelAtSize,
    TimedStep,
)
from comfyui_agd.examples.toy.tables import Column, console_table

DTYPES = ("fp32", "fp16", "bf16", "fp8")
USUAL = ("SD 1.5", "SDXL")
STEPS_INSIDE = 2
# On a GPU bringing changes into the weights takes longer than a step: more steps each time.
_LARGE = (
    ModelAtSize("Qwen-Image", 1328, 1328, 3, steps=6),
    ModelAtSize("Wan 2.2 14B", 832, 480, 3, frames=9, steps=3, reduced=True),
)
FULL = {
    "cpu": (ModelAtSize("SD 1.5", 512, 512, 6), ModelAtSize("SDXL", 256, 256, 6, reduced=True), *_LARGE),
    "cuda": (ModelAtSize("SD 1.5", 512, 512, 12, steps=6), ModelAtSize("SDXL", 1024, 1024, 12, steps=6), *_LARGE),
}
QUICK = {
    "cpu": (ModelAtSize("SD 1.5", 256, 256, 5, reduced=True),),
    "cuda": (ModelAtSize("SD 1.5", 512, 512, 4, steps=6), ModelAtSize("SDXL", 1024, 1024, 4, steps=6), *_LARGE),
}
_TINY_ROUNDS = 2
_SHARE_TO_BEGIN = 0.75  # of the time: by torch.compile most of it goes into that


def peak_bytes(method: Method, device: torch.device) -> int | None:
    """The most memory during one step: what torch has on a GPU, the whole process on a Linux CPU."""
    unload_adapters()
    method.sampling(1)
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        method.sampling(1)
        return torch.cuda.max_memory_allocated(device)
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    clear.write_text("5")  # the peak starts again from what is used now
    method.sampling(1)
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def unload_adapters() -> None:
    """Those of methods that were sampled before; ComfyUI has no reason to."""
    import comfy.model_management

    from comfyui_agd.agd_core.adapter import Adapter

    loaded = comfy.model_management.current_loaded_models
    for each in [each for each in loaded if each.model and isinstance(each.model.model, Adapter)]:
        each.model_unload()
        loaded.remove(each)


class AdapterTimer:
    """Wraps what a model calls of an adapter, and the adapter's layers, for some steps.

    Counts the seconds inside, and the bytes moved at the layers that it adapts.
    """

    _ENTRY = "adapter"
    # Tensors of the result's size that come or go.
    _MOVED = {"add_after_attention": 3, "add_inside_attention": 4, "add_at_linear": 3}

    def __init__(self, adapter: torch.nn.Module, clock: Clock):
        self.clock, self.moved = clock, 0
        parts = {"encoder": adapter.encoders, **dict(adapter.kind.named_children())}
        groups = {name: [m for m in part.modules() if not list(m.children())] for name, part in parts.items()}
        self.calls = [(adapter, method, self._ENTRY) for method in ("prepare", *self._MOVED)]
        self.calls += [(layer, "forward", name) for name, layers in groups.items() for layer in layers]
        self.moments: dict[str, list] = {name: [] for name in (self._ENTRY, *groups)}

    def __enter__(self):
        for owner, method, name in self.calls:
            setattr(owner, method, self._timed(getattr(owner, method), self.moments[name], self._MOVED.get(method, 0)))
        return self

    def __exit__(self, *_):
        for owner, method, _ in self.calls:
            delattr(owner, method)

    def _timed(self, function, moments: list, tensors: int):
        def timed(*args, **kwargs):
            start = self.clock.moment()
            result = function(*args, **kwargs)
            moments.append((start, self.clock.moment()))
            if tensors:
                self.moved += tensors * result.nbytes
            return result

        return timed

    def seconds(self) -> float:
        return self._total(self._ENTRY)

    def shares(self) -> dict[str, float]:
        """Of the seconds inside: by layer, and what is left for reshaping, adding up, and attention of its own."""
        if not self.seconds():  # all of it is in the base's weights
            return {}
        shares = {name: self._total(name) / self.seconds() for name in self.moments if name != self._ENTRY}
        return shares | {"the rest": 1 - sum(shares.values())}

    def _total(self, name: str) -> float:
        return sum(self.clock.between(*pair) for pair in self.moments[name])


def counted_per_step(method: Method) -> tuple[int, int]:
    """(evaluations, FLOPs) of a step that is not a sampling's first."""
    counts = []
    for steps in (1, 2):
        method.rows.clear()
        with FlopCounterMode(display=False) as flops:
            method.sampling(steps)
        counts.append((method.rows.total, flops.get_total_flops()))
    evaluations, flops = (b - a for a, b in zip(*counts, strict=True))
    return evaluations, flops


def measure_adapter(method: Method, clock: Clock) -> dict:
    """The time inside the adapter, and the bytes that it moves at least."""
    with AdapterTimer(method.adapter, clock) as timer:
        spent = sum(step.seconds for step in method.sampling(STEPS_INSIDE))
    weights = sum(parameter.nbytes for parameter in method.adapter.parameters())
    return {
        "inside": timer.seconds() / spent,
        "inside_shares": timer.shares(),
        "floor_bytes": weights + timer.moved // STEPS_INSIDE,
    }


def measure_besides(
    methods: list[Method], device: torch.device, args: argparse.Namespace, after_each: Callable[[], object]
) -> None:
    """All that is measured or counted besides the seconds of a step."""
    clock = Clock(device)

    def besides(method: Method) -> None:
        method.found["peak_bytes"] = peak_bytes(method, device)
        if args.profile and method.name not in CACHED:
            method.found |= kernels_per_step(method.sampling, device, None if args.compile else method.adapter)
        if args.compile or method.name in CACHED:
            return  # an adapter's calls are compiled away, and rows and FLOPs are those of the other runs
        method.found["evaluations_per_step"], method.found["flops_per_step"] = counted_per_step(method)
        if method.adapter is not None:
            method.found |= measure_adapter(method, clock)

    for method in methods:
        method.attempt(besides)
        after_each()


def begin(made: Methods, name: str, until: float) -> Method:
    """A method that was sampled once: loaded, autotuned, compiled. One that there was no time for has failed."""
    if time.monotonic() > until:
        return Method(name, failed="no time was left to begin it")
    start = time.monotonic()
    try:
        method = made.make(name)
    except Exception as error:
        print(f"  {name} can't be made: {error_text(error)}", flush=True)
        return Method(name, failed=error_text(error))
    method.attempt(lambda method: method.sampling(1))
    method.found["seconds_to_begin"] = time.monotonic() - start
    return method


def measure(methods: list[Method], rounds: int, until: float, after_round: Callable[[], object]) -> None:
    """At least two rounds, as many of the others as there is time for."""

    def take_round(method: Method) -> None:
        # The first step of a sampling also looks up the negative prompt's keys and values.
        steps = method.sampling(method.steps)[1:]
        method.seconds.append(statistics.fmean(step.seconds for step in steps))
        method.timed += steps

    for done in range(rounds):
        if done >= 2 and time.monotonic() > until:
            break
        for method in methods:
            method.attempt(take_round)
        print(f"  round {done + 1} of {rounds}", flush=True)
        after_round()


def rows_of(at: ModelAtSize, dtype: str, args: argparse.Namespace, methods: list[Method]) -> list[dict]:
    of = {method.name: method for method in methods}
    return [row_of(at, dtype, args, method, of.get("unguided"), of.get("cfg")) for method in methods]


def row_of(
    at: ModelAtSize, dtype: str, args: argparse.Namespace, method: Method, unguided: Method | None, cfg: Method | None
) -> dict:
    row = {
        "model": at.model,
        "size": at.size,
        "reduced": at.reduced,
        "device": args.device,
        "dtype": dtype,
        "compiled": args.compile,
        "tiny": args.tiny,
        "method": method.name,
        "rounds": len(method.seconds),
    }
    if method.messages:
        row["messages"] = list(dict.fromkeys(method.messages))
    if method.failed:
        row["failed"] = method.failed
    if len(method.seconds) < 2:
        return row | method.found
    row["seconds_per_step"] = statistics.median(method.seconds)
    row["seconds_of_rounds"] = method.seconds
    for other, name in ((unguided, "unguided"), (cfg, "cfg")):
        if other is not None and other.seconds:
            row[f"ratio_to_{name}"] = row["seconds_per_step"] / statistics.median(other.seconds)
    if unguided is not None and len(unguided.seconds) > 1:
        # One that failed had fewer rounds.
        ratios = [a / b for a, b in zip(method.seconds, unguided.seconds, strict=False)]
        low, _, high = statistics.quantiles(ratios, n=4)
        row["ratio_quartiles"] = [low, high]
        if "flops_per_step" in method.found and "flops_per_step" in unguided.found:
            row["floor_flops"] = method.found["flops_per_step"] / unguided.found["flops_per_step"] - 1
    return row | (left_out(method.timed) if method.name in CACHED else {}) | method.found


def left_out(steps: list[TimedStep]) -> dict:
    """Of steps that are evaluated and others that aren't: the rows per step, and the seconds of either sort."""
    found = {"evaluations_per_step": statistics.fmean(step.rows for step in steps)}
    for name, wanted in (("evaluated", True), ("left_out", False)):
        if seconds := [step.seconds for step in steps if bool(step.rows) == wanted]:
            found[f"seconds_{name}"] = statistics.median(seconds)
    return found


def _quartiles(row: dict) -> str:
    if "ratio_quartiles" not in row:
        return ""
    low, high = row["ratio_quartiles"]
    return f"{low:.3f}-{high:6.3f}"


def _value(key: str, form: str, factor: float = 1) -> Callable[[dict], str]:
    return lambda row: format(row[key] * factor, form) if row.get(key) is not None else ""


def _of_adapter(key: str, form: str, factor: float = 1) -> Callable[[dict], str]:
    return lambda row: _value(key, form, factor)(row) if "inside" in row else ""


_COLUMNS = (
    Column("method", lambda row: row["method"], -15),
    Column("rows", _value("evaluations_per_step", ".3g"), 5),
    Column("s/step", _value("seconds_per_step", ".4f"), 9),
    Column("/unguided", _value("ratio_to_unguided", ".3f"), 10),
    Column("quartiles", _quartiles, 14),
    Column("/cfg", _value("ratio_to_cfg", ".3f"), 7),
    Column("peak GB", _value("peak_bytes", ".2f", 1e-9), 9),
    Column("inside", _of_adapter("inside", ".2%"), 8),
    Column("floor", _of_adapter("floor_flops", ".2%"), 8),
    Column("floor MB", _of_adapter("floor_bytes", ".0f", 1e-6), 9),
    Column("kernels", _value("kernels_per_step", "d"), 9),
    Column("ms", _value("kernel_seconds_per_step", ".2f", 1e3), 9),
    Column("inside", _value("kernels_inside", "d"), 8),
    Column("ms", _value("kernel_seconds_inside", ".2f", 1e3), 8),
    Column("  failed", lambda row: f"  {row.get('failed', '')[:60]}", -10),
)


def print_shares(rows: list[dict]) -> None:
    """And what users would be told."""
    for row in rows:
        for message in row.get("messages", ()):
            print(f"{row['method']}: {message}")
        if row.get("inside_shares"):
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row["inside_shares"].items())
            print(f"inside {row['method']}: {shares}")


def default_dtypes(device: torch.device) -> list[str]:
    from comfyui_agd.agd_core.comfyui.model.denoiser import computes_bf16

    if device.type == "cuda":
        return ["fp16", "bf16"]
    return ["bf16" if computes_bf16(device) else "fp32"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="under five minutes on two CPU cores")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: what the device computes fast")
    parser.add_argument("--rounds", type=int, help="instead of each model's own number")
    parser.add_argument("--compile", action="store_true", help="through ComfyUI's TorchCompileModel")
    parser.add_argument("--profile", action="store_true", help="count kernels, and those inside the adapter")
    names = ", ".join(("unguided", "cfg", *ADAPTERS, LOW_RANK_ALONE, *CACHED))
    how = f"of {names}; default: all, on a CPU without the last four"
    parser.add_argument("--only", nargs="+", metavar="METHOD", help=how)
    parser.add_argument("--minutes", type=float, help="begin no more rounds of a model in a dtype after that long")
    add_base(parser, NAMES)
    return parser.parse_args(argv)


def measure_model(at: ModelAtSize, dtype: str, args: argparse.Namespace, keep: Callable[[list[dict]], None]) -> None:
    """A row per method, printed, and handed to `keep` after each round."""
    notes = [device_name(args.device), f"{torch.get_num_threads()} threads", dtype]
    notes += ["smaller than people sample at"] * at.reduced + ["compiled"] * args.compile + ["tiny"] * args.tiny
    print(f"\n{at.model} at {at.size} ({', '.join(notes)})", flush=True)
    device, until = device_called(args.device), time.monotonic() + 60 * (args.minutes or 1e6)
    made = Methods(RandomBase(at.model, args.tiny), at, dtype, device, args.compile)
    methods: list[Method] = []

    def note() -> list[dict]:
        rows = rows_of(at, dtype, args, methods)
        keep(rows)
        return rows

    # What has begun is measured twice at least.
    start = time.monotonic()
    for name in chosen_methods(args, made):
        methods.append(begin(made, name, start + _SHARE_TO_BEGIN * (until - start)))
        note()
    measure(methods, args.rounds or at.rounds, until, note)
    measure_besides(methods, device, args, note)
    rows = note()
    print(*console_table(_COLUMNS, rows), sep="\n")
    print_shares(rows)


def chosen_methods(args: argparse.Namespace, made: Methods) -> list[str]:
    """Whole samplings take too long on a CPU, but of tiny models."""
    if args.only:
        return args.only
    whole = args.device != "cpu" or args.tiny
    return [name for name in made.names if whole or name not in (LOW_RANK_ALONE, *CACHED)]


def chosen_models(args: argparse.Namespace) -> list[ModelAtSize]:
    found = [at for at in (QUICK if args.quick else FULL)[args.device] if at.model in (args.model or USUAL)]
    if args.tiny:
        tiny = {"width": TINY_PIXELS, "height": TINY_PIXELS, "rounds": _TINY_ROUNDS, "reduced": True}
        return [replace(at, **tiny, frames=min(at.frames, 2)) for at in found]
    return found


def main() -> None:
    args = parse()
    use_comfyui(args.comfyui, cpu=args.device == "cpu")
    from comfyui_agd.agd_core import forecast

    forecast.TOLERANCE = FORCED
    rows: list[dict] = []

    def kept(own: list[dict]) -> None:
        if args.json:
            write_rows(args.json, rows + own)

    for at in chosen_models(args):
        for dtype in args.dtype or default_dtypes(torch.device(args.device)):
            own: list[dict] = []

            def keep(found: list[dict], own: list[dict] = own) -> None:
                own[:] = found
                kept(own)

            measure_model(at, dtype, args, keep)
            rows += own
            release_memory()


if __name__ == "__main__":
    main()

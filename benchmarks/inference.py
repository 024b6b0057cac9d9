"""What a sampling step costs: unguided, with CFG and with AGD, at the true sizes of SD 1.5 and SDXL.

    python benchmarks/inference.py [--device cuda] [--dtype fp16 bf16] [--compile] [--quick] [--json FILE]

Random weights: time and memory do not depend on their values. Every step goes through ComfyUI's own guider, wrappers
and patches. The methods take turns, so that a machine that slows down slows all of them: two steps each, of which the
second is timed, for the first one also computes what a whole sampling needs once. Ratios are of medians, with the
quartiles of the ratio to the unguided step of the same round beside them.

Two figures besides, for adapters whose cost drowns in the noise of a step. `inside`: the share of the step that is
spent in the adapter, timed at its calls in further steps (on a GPU by the device's own clock); the attention to the
negative prompt is the base's own and not inside. `floor`: what must be spent, counted: the FLOPs beyond the unguided
step's, that attention's among them, and the bytes that the adapter moves at least (its weights once; each adapted
layer's input, attention output, sum, and delta).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_base, benchmark_parser
from comfyui_agd.benchmarks.machine import device_name, release_memory
from comfyui_agd.benchmarks.output import write_rows
from comfyui_agd.examples.toy.tables import Column, console_table

ADAPTERS = {
    "agd": {"kind": "delta", "rank": 16},
    # What it costs where low-rank changes can't be in the weights.
    "agd-modulated": {"kind": "delta", "rank": 16, "modulated": True},
    # The paper authors' own, as wide as they publish figures of, and by their default.
    "paper-128": {"kind": "paper_attention", "hidden": 128},
    "paper-320": {"kind": "paper_attention", "hidden": 320},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OMEGA = 7.0
STEPS_INSIDE = 2


@dataclass(frozen=True)
class ModelAtSize:
    """A model, the size of its pictures, how many rounds are measured, and whether people sample at larger sizes."""

    model: str
    pixels: int
    rounds: int
    pooled: int = 768
    reduced: bool = False


FULL = {"cpu": [ModelAtSize("SD 1.5", 512, 6), ModelAtSize("SDXL", 256, 6, 1280, reduced=True)]}
FULL["cuda"] = [ModelAtSize("SD 1.5", 512, 40), ModelAtSize("SDXL", 1024, 40, 1280)]
QUICK = {"cpu": [ModelAtSize("SD 1.5", 256, 5, reduced=True)]}
QUICK["cuda"] = [ModelAtSize("SD 1.5", 512, 10), ModelAtSize("SDXL", 1024, 10, 1280)]


@dataclass
class Method:
    """One way to take a step. `adapter` is the module at work, if there is one."""

    name: str
    sampling: Callable[[int], list[float]]
    rows: object  # a RowCounter, where nothing is compiled
    adapter: torch.nn.Module | None = None
    seconds: list[float] = field(default_factory=list)
    found: dict = field(default_factory=dict)


class Clock:
    """Seconds between two moments, by the device's own events on a GPU."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def moment(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


def timed_sampler(clock: Clock, seconds: list[float]):
    """A ComfyUI sampler of Euler steps that notes the seconds of each evaluation of the guided model."""
    import comfy.samplers

    class Timed(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *rest):
            x, moments = noise * sigmas[0], []
            for i in range(len(sigmas) - 1):
                start = clock.moment()
                denoised = model_wrap(x, sigmas[i].expand(x.shape[0]), **extra_args)
                moments.append((start, clock.moment()))
                x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            seconds.extend(clock.between(*pair) for pair in moments)
            return x

    return Timed()


def sampling_of(model, cfg: float, at: ModelAtSize, clock: Clock) -> Callable[[int], list[float]]:
    """A function that takes so many steps and returns the seconds of each."""
    import comfy.samplers

    width = model.model.model_config.unet_config["context_dim"]
    generator = torch.Generator().manual_seed(1)

    def prompt() -> list:
        pooled = {"pooled_output": torch.randn(1, at.pooled, generator=generator)}
        return [[torch.randn(1, 77, width, generator=generator), pooled]]

    positive, negative = prompt(), prompt()
    noise = torch.randn(1, 4, at.pixels // 8, at.pixels // 8, generator=generator)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 20)

    @torch.inference_mode()
    def run(steps: int) -> list[float]:
        seconds = []
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sampler = timed_sampler(clock, seconds)
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas[: steps + 1], disable_pbar=True)
        return seconds

    return run


def make_methods(
    at: ModelAtSize, dtype: torch.dtype, device: torch.device, compiled: bool, clock: Clock
) -> list[Method]:
    import comfy.model_patcher

    from comfyui_agd.agd_core.adapter import Adapter
    from comfyui_agd.agd_core.comfyui.backbones import describe_base
    from comfyui_agd.agd_core.comfyui.counting import counted
    from comfyui_agd.agd_core.comfyui.guided_step import KEY
    from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
    from comfyui_agd.tests.support.checkpoints import random_model
    from comfyui_agd.tests.support.small import info_for, randomised

    base = comfy.model_patcher.ModelPatcher(
        random_model(at.model, device, dtype), load_device=device, offload_device=torch.device("cpu")
    )

    def whole(model):
        if not compiled:
            return model
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        return TorchCompileModel.execute(model, "inductor").args[0]

    def method(name: str, model, cfg: float, adapter: torch.nn.Module | None = None) -> Method:
        model, counter = (model, None) if compiled else counted(model)
        return Method(name, sampling_of(whole(model), cfg, at, clock), counter, adapter)

    methods = [method("unguided", base, 1.0), method("cfg", base, OMEGA)]
    for name, config in ADAPTERS.items():
        info = info_for(describe_base(base.model), **config)
        weights = randomised(Adapter(info.config)).state_dict()
        model = apply_adapter(base, info, weights, source=name, notify=lambda message: None)
        (patcher,) = model.get_additional_models_with_key(KEY)
        methods.append(method(name, model, OMEGA, patcher.model))
    return methods


def peak_bytes(method: Method, device: torch.device) -> int | None:
    """The most memory during one step: what torch has on a GPU, the whole process on a Linux CPU."""
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
        spent = sum(method.sampling(STEPS_INSIDE))
    weights = sum(parameter.nbytes for parameter in method.adapter.parameters())
    return {
        "inside": timer.seconds() / spent,
        "inside_shares": timer.shares(),
        "floor_bytes": weights + timer.moved // STEPS_INSIDE,
    }


def measure_besides(methods: list[Method], device: torch.device, clock: Clock, compiled: bool) -> None:
    """All that is measured or counted besides the seconds of a step."""
    for method in methods:
        method.found["peak_bytes"] = peak_bytes(method, device)
        if compiled:
            continue  # an adapter's calls are compiled away, and rows and FLOPs are those of the other runs
        method.found["evaluations_per_step"], method.found["flops_per_step"] = counted_per_step(method)
        if method.adapter is not None:
            method.found |= measure_adapter(method, clock)


def measure(methods: list[Method], rounds: int) -> None:
    for method in methods:
        method.sampling(1)  # loading, autotuning, compiling
    for done in range(rounds):
        for method in methods:
            # The first step of a sampling also looks up the negative prompt's keys and values.
            method.seconds += method.sampling(2)[1:]
        print(f"  round {done + 1} of {rounds}", flush=True)


def rows_of(at: ModelAtSize, dtype: str, device: str, compiled: bool, methods: list[Method]) -> list[dict]:
    of = {method.name: method for method in methods}
    unguided, cfg = of["unguided"], of["cfg"]
    rows = []
    for method in methods:
        seconds = statistics.median(method.seconds)
        ratios = [a / b for a, b in zip(method.seconds, unguided.seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        row = {
            "model": at.model,
            "size": f"{at.pixels}x{at.pixels}",
            "reduced": at.reduced,
            "device": device,
            "dtype": dtype,
            "compiled": compiled,
            "method": method.name,
            "rounds": len(method.seconds),
            "seconds_per_step": seconds,
            "ratio_to_unguided": seconds / statistics.median(unguided.seconds),
            "ratio_quartiles": [low, high],
            "ratio_to_cfg": seconds / statistics.median(cfg.seconds),
            **method.found,
        }
        if "flops_per_step" in method.found:
            row["floor_flops"] = method.found["flops_per_step"] / unguided.found["flops_per_step"] - 1
        rows.append(row)
    return rows


def _quartiles(row: dict) -> str:
    low, high = row["ratio_quartiles"]
    return f"{low:.3f}-{high:6.3f}"


def _of_adapter(key: str, form: str, factor: float = 1) -> Callable[[dict], str]:
    return lambda row: format(row[key] * factor, form) if "inside" in row else ""


_COLUMNS = (
    Column("method", lambda row: row["method"], -14),
    Column("rows", lambda row: str(row.get("evaluations_per_step", "")), 5),
    Column("s/step", lambda row: f"{row['seconds_per_step']:.4f}", 9),
    Column("/unguided", lambda row: f"{row['ratio_to_unguided']:.3f}", 10),
    Column("quartiles", _quartiles, 14),
    Column("/cfg", lambda row: f"{row['ratio_to_cfg']:.3f}", 7),
    Column("peak GB", lambda row: f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "", 9),
    Column("inside", _of_adapter("inside", ".2%"), 8),
    Column("floor", _of_adapter("floor_flops", ".2%"), 8),
    Column("floor MB", _of_adapter("floor_bytes", ".0f", 1e-6), 9),
)


def print_shares(rows: list[dict]) -> None:
    for row in rows:
        if "inside_shares" in row:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row["inside_shares"].items())
            print(f"inside {row['method']}: {shares}")


def default_dtypes(device: torch.device) -> list[str]:
    from comfyui_agd.agd_core.comfyui.model.denoiser import computes_bf16

    if device.type == "cuda":
        return ["fp16", "bf16"]
    return ["bf16" if computes_bf16(device) else "fp32"]


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="under five minutes on two CPU cores")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: what the device computes fast")
    parser.add_argument("--rounds", type=int, help="instead of each model's own number")
    parser.add_argument("--compile", action="store_true", help="through ComfyUI's TorchCompileModel")
    add_base(parser)
    return parser.parse_args()


def measure_model(at: ModelAtSize, dtype: str, args: argparse.Namespace) -> list[dict]:
    """A row per method, printed too."""
    notes = [device_name(args.device), f"{torch.get_num_threads()} threads", dtype]
    notes += ["smaller than people sample at"] * at.reduced + ["compiled"] * args.compile
    print(f"\n{at.model} at {at.pixels}x{at.pixels} ({', '.join(notes)})", flush=True)
    device = torch.device(args.device)
    clock = Clock(device)
    methods = make_methods(at, DTYPES[dtype], device, args.compile, clock)
    measure(methods, args.rounds or at.rounds)
    measure_besides(methods, device, clock, args.compile)
    rows = rows_of(at, dtype, args.device, args.compile, methods)
    print(*console_table(_COLUMNS, rows), sep="\n")
    print_shares(rows)
    return rows


def main() -> None:
    args = parse()
    use_comfyui(args.comfyui, cpu=args.device == "cpu")
    rows = []
    for at in (QUICK if args.quick else FULL)[args.device]:
        if args.model not in (None, at.model):
            continue
        for dtype in args.dtype or default_dtypes(torch.device(args.device)):
            rows += measure_model(at, dtype, args)
            release_memory()
            if args.json:
                write_rows(args.json, rows)


if __name__ == "__main__":
    main()

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
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_base, benchmark_parser
from comfyui_agd.benchmarks.kernels import kernels_per_step
from comfyui_agd.benchmarks.machine import device_called, device_name, error_text, release_memory
from comfyui_agd.benchmarks.output import write_rows
from comfyui_agd.benchmarks.random_bases import NAMES, TINY_PIXELS, RandomBase
from comfyui_agd.examples.toy.tables import Column, console_table

ADAPTERS = {
    "agd": {"kind": "delta", "rank": 16},
    # What it costs where low-rank changes can't be in the weights.
    "agd-modulated": {"kind": "delta", "rank": 16, "modulated": True},
    # The paper authors' own, as wide as they publish figures of, and by their default.
    "paper-128": {"kind": "paper_attention", "hidden": 128},
    "paper-320": {"kind": "paper_attention", "hidden": 320},
}
# All of it can be in the weights.
LOW_RANK = {"kind": "low_rank", "rank": 16, "vector": 0}
# Beside CFG and these adapters: what others leave out of CFG, and of the default adapter.
CACHED = ("training-free", "easy-cache", "agd-easy-cache")
DTYPES = ("fp32", "fp16", "bf16", "fp8")
USUAL = ("SD 1.5", "SDXL")
OMEGA = 7.0
STEPS_INSIDE = 2
CACHED_STEPS = 10  # of 20: a cache that may be used from a share of the schedule on has begun to be
_FORCED = 1e9  # what a forecast's error may be, and how much a cache's input may change
_SMALL = 1e-3  # of weights that begin at zero: an adapter at work, whose pictures stay finite


@dataclass(frozen=True)
class ModelAtSize:
    """A model, the size of its pictures or videos, how many rounds of `steps` are measured, and whether people sample
    at larger sizes. `frames`: of a video's latents."""

    model: str
    width: int
    height: int
    rounds: int
    frames: int = 1
    steps: int = 2
    reduced: bool = False

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}" + (f", {4 * self.frames - 3} frames" if self.frames > 1 else "")


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


@dataclass
class Method:
    """One way to take a step. `adapter` is the module at work, if there is one. `steps`: of a round; `seconds`: of its
    mean step, for each round; `timed`: its steps, one by one. `messages`: that users would see. `failed`:
    why there is nothing of it, or no more."""

    name: str
    sampling: Callable[[int], list["TimedStep"]] | None = None
    rows: object = None  # a RowCounter, where nothing is compiled
    adapter: torch.nn.Module | None = None
    steps: int = 2
    seconds: list[float] = field(default_factory=list)
    timed: list["TimedStep"] = field(default_factory=list)
    found: dict = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    failed: str | None = None

    def attempt(self, measurement: Callable[["Method"], object]) -> None:
        """One that fails ends this method's measuring, not the others'."""
        if self.failed is None:
            try:
                measurement(self)
            except Exception as error:
                self.failed = error_text(error)
                print(f"  {self.name} failed: {self.failed}", flush=True)
                release_memory()


@dataclass(frozen=True)
class TimedStep:
    """`rows`: that the model evaluated; None where they aren't counted."""

    seconds: float
    rows: int | None


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


def timed_sampler(clock: Clock, counter, steps: list[TimedStep]):
    """A ComfyUI sampler of Euler steps that notes the seconds of each evaluation of the guided model."""
    import comfy.samplers

    def evaluated() -> int:
        return 0 if counter is None else counter.total

    class Timed(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *rest):
            x, moments = noise * sigmas[0], []
            for i in range(len(sigmas) - 1):
                start, before = clock.moment(), evaluated()
                denoised = model_wrap(x, sigmas[i].expand(x.shape[0]), **extra_args)
                moments.append((start, clock.moment(), evaluated() - before))
                x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            for start, end, rows in moments:
                steps.append(TimedStep(clock.between(start, end), None if counter is None else rows))
            return x

    return Timed()


def sampling_of(model, cfg: float, base: RandomBase, at: ModelAtSize, clock: Clock, counter=None):
    """A function that takes so many steps and returns them."""
    import comfy.samplers

    from comfyui_agd.agd_core.comfyui.model.denoiser import ComfyDenoiser

    positive, negative = base.prompt(1), base.prompt(2)
    shape = ComfyDenoiser(model, frames=at.frames).latent_shape(at.width, at.height)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 20)

    @torch.inference_mode()
    def run(steps: int) -> list[TimedStep]:
        taken: list[TimedStep] = []
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sampler = timed_sampler(clock, counter, taken)
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas[: steps + 1], disable_pbar=True)
        return taken

    return run


class Methods:
    """Makes methods by their names, on one base."""

    def __init__(self, base: RandomBase, at: ModelAtSize, dtype: str, device: torch.device, compiled: bool):
        from comfyui_agd.agd_core.comfyui.backbones import describe_base

        self.base, self.at, self.compiled, self.clock = base, at, compiled, Clock(device)
        self.patcher = base.patcher(dtype, device)
        self.described = describe_base(self.patcher.model)
        self.adapters = adapters_of(self.described)

    @property
    def names(self) -> list[str]:
        """Caches are measured where rows are counted."""
        return ["unguided", "cfg", *self.adapters, *([] if self.compiled else CACHED)]

    def make(self, name: str) -> Method:
        """Raises what making it raises, and `ValueError` where the base has no such method."""
        from comfyui_agd.agd_core.comfyui.guided_step import KEY
        from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free
        from comfyui_agd.benchmarks.step_caches import easy_cache

        if name not in self.names:
            raise ValueError(f"There is no {name} here; there are {', '.join(self.names)}.")
        method = Method(name, steps=max(self.at.steps, CACHED_STEPS) if name in CACHED else self.at.steps)
        if name == "training-free":
            model = apply_training_free(self.patcher, notify=method.messages.append)
        elif name == "easy-cache":
            model = easy_cache(self.patcher, _FORCED)
        elif name == "agd-easy-cache":
            model = easy_cache(self._with_adapter("agd", method), _FORCED)
        else:
            model = self._with_adapter(name, method) if name in self.adapters else self.patcher
        if patchers := model.get_additional_models_with_key(KEY):
            method.adapter = patchers[0].model
        return self._sampled(method, model, 1.0 if name == "unguided" else OMEGA)

    def _with_adapter(self, name: str, method: Method):
        from comfyui_agd.agd_core.adapter import Adapter
        from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter

        tokens = self.base.prompt(2)[0][0].shape[1]
        info = info_of(self.described, self.adapters[name], tokens)
        adapter, generator = Adapter(info.config), torch.Generator().manual_seed(0)
        for _, parameter in adapter.trained():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=_SMALL, generator=generator)
        return apply_adapter(self.patcher, info, adapter.state_dict(), source=name, notify=method.messages.append)

    def _sampled(self, method: Method, model, cfg: float) -> Method:
        from comfyui_agd.agd_core.comfyui.counting import counted

        if self.compiled:
            from comfy_extras.nodes_torch_compile import TorchCompileModel

            model = TorchCompileModel.execute(model, "inductor").args[0]
        else:
            model, method.rows = counted(model)
        method.sampling = sampling_of(model, cfg, self.base, self.at, self.clock, method.rows)
        return method


def adapters_of(described) -> dict[str, dict]:
    """By name, the settings of those that a base is measured with: on transformers the default one in place of those
    that are for UNets."""
    return (ADAPTERS if described.layout == "unet" else {"agd": {}}) | {"low-rank": LOW_RANK}


def info_of(described, settings: dict, tokens: int):
    """An adapter of that base, as training would make it with negative prompts of so many tokens."""
    from comfyui_agd.agd_core.adapter_file import AdapterInfo
    from comfyui_agd.training.presets import settings_for

    training = settings_for(described, settings)
    config, omegas = training.adapter_config(described, tokens), (training.omega_min, training.omega_max)
    mode = "used" if config.kind.uses_negative else "ignored"
    return AdapterInfo(config=config, base=described, omega_range=omegas, negative_mode=mode)


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
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods; default: all that a base has")
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
    for name in args.only or made.names:
        methods.append(begin(made, name, start + _SHARE_TO_BEGIN * (until - start)))
        note()
    measure(methods, args.rounds or at.rounds, until, note)
    measure_besides(methods, device, args, note)
    rows = note()
    print(*console_table(_COLUMNS, rows), sep="\n")
    print_shares(rows)


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

    forecast.TOLERANCE = _FORCED
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

"""What a sampling step costs: unguided, with CFG and with AGD, at the true sizes of SD 1.5 and SDXL.

    python benchmarks/inference.py [--device cuda] [--dtype fp16 bf16] [--compile] [--quick] [--json FILE]

Random weights: time and memory do not depend on their values. Every step goes through ComfyUI's own guider, wrappers
and patches. The methods take turns, so that a machine that slows down slows all of them: two steps each, of which the
second is timed, for the first one also computes what a whole sampling needs once. Ratios are of medians, with the
quartiles of the ratio to the unguided step of the same round beside them.

Two figures besides, for adapters whose cost drowns in the noise of a step. `inside`: the share of the step that is
spent in the adapter, timed at its calls in further steps (on a GPU by the device's own clock); the attention to the
negative prompt is the base's own and not inside. `floor`: what must be spent, counted: the FLOPs beyond the unguided
step's, that attention's among them, and the bytes that the adapter moves at least (its weights once; each site's input,
attention output, sum, and delta).
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui

# Our re-implementation of the paper's adapter, which differs from the authors' own in size and form (docs/method.md).
PAPER = {"kind": "cross_attention", "gain": False, "omega_embedding": "fourier", "shared_encoder": False}
ADAPTERS = {
    "agd": {"rank": 4},
    "agd-modulated": {"rank": 4, "modulated": True},  # what it costs where low-rank changes can't be in the weights
    "paper-128": {**PAPER, "hidden": 128},
    "paper-320": {**PAPER, "hidden": 320},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OMEGA = 7.0
STEPS_INSIDE = 2


@dataclass(frozen=True)
class Case:
    """A model at a picture size, how many rounds are measured, and whether people sample at larger sizes."""

    model: str
    pixels: int
    rounds: int
    pooled: int = 768
    reduced: bool = False


FULL = {"cpu": [Case("SD 1.5", 512, 6), Case("SDXL", 256, 6, 1280, reduced=True)]}
FULL["cuda"] = [Case("SD 1.5", 512, 40), Case("SDXL", 1024, 40, 1280)]
QUICK = {"cpu": [Case("SD 1.5", 256, 5, reduced=True)]}
QUICK["cuda"] = [Case("SD 1.5", 512, 10), Case("SDXL", 1024, 10, 1280)]


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


def sampling_of(model, cfg: float, case: Case, clock: Clock) -> Callable[[int], list[float]]:
    """A function that takes so many steps and returns the seconds of each."""
    import comfy.samplers

    width = model.model.model_config.unet_config["context_dim"]
    generator = torch.Generator().manual_seed(1)

    def prompt() -> list:
        pooled = {"pooled_output": torch.randn(1, case.pooled, generator=generator)}
        return [[torch.randn(1, 77, width, generator=generator), pooled]]

    positive, negative = prompt(), prompt()
    noise = torch.randn(1, 4, case.pixels // 8, case.pixels // 8, generator=generator)
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


def make_methods(case: Case, dtype: torch.dtype, device: torch.device, compiled: bool, clock: Clock) -> list[Method]:
    import comfy.model_patcher

    from comfyui_agd.agd_core.adapter import Adapter
    from comfyui_agd.agd_core.comfyui.backbones.unet import describe_base
    from comfyui_agd.agd_core.comfyui.counting import counted
    from comfyui_agd.agd_core.comfyui.patch import KEY
    from comfyui_agd.agd_core.comfyui.sampling.guided_sampling import apply_adapter
    from comfyui_agd.tests.support.checkpoints import random_model
    from comfyui_agd.tests.support.small import info_for, randomised

    base = comfy.model_patcher.ModelPatcher(
        random_model(case.model, dtype, device), load_device=device, offload_device=torch.device("cpu")
    )

    def whole(model):
        if not compiled:
            return model
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        return TorchCompileModel.execute(model, "inductor").args[0]

    def method(name: str, model, cfg: float, adapter: torch.nn.Module | None = None) -> Method:
        model, counter = (model, None) if compiled else counted(model)
        return Method(name, sampling_of(whole(model), cfg, case, clock), counter, adapter)

    methods = [method("unguided", base, 1.0), method("cfg", base, OMEGA)]
    for name, config in ADAPTERS.items():
        info = info_for(describe_base(base.model), **config)
        state = randomised(Adapter(info.config)).state_dict()
        model = apply_adapter(base, info, state, source=name, notify=lambda message: None)
        (patcher,) = model.get_additional_models_with_key(KEY)
        methods.append(method(name, model, OMEGA, patcher.model))
    return methods


def release_memory() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(method: Method, device: torch.device) -> int | None:
    """The most memory during one step: what torch has on a GPU, the whole process on a Linux CPU."""
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        method.sampling(1)
        return torch.cuda.max_memory_allocated(device)
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    forget.write_text("5")  # the peak starts again from what is used now
    method.sampling(1)
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


class Doors:
    """Wraps what the hooks call of an adapter, and its layers, for some steps: seconds inside, bytes moved at sites."""

    _MOVED = {"add": 3, "guide": 4, "adapt": 3}  # tensors of the result's size that come or go

    def __init__(self, adapter: torch.nn.Module, clock: Clock):
        self.clock, self.moved = clock, 0
        parts = {"encoder": adapter.encoders, **dict(adapter.sites.named_children())}
        groups = {name: [m for m in part.modules() if not list(m.children())] for name, part in parts.items()}
        self.calls = [(adapter, method, "doors") for method in ("prepare", *self._MOVED)]
        self.calls += [(layer, "forward", name) for name, layers in groups.items() for layer in layers]
        self.moments: dict[str, list] = {name: [] for name in ("doors", *groups)}

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
        return self._total("doors")

    def shares(self) -> dict[str, float]:
        """Of the seconds inside: by layer, and what is left for reshaping, adding up, and attention of its own."""
        shares = {name: self._total(name) / self.seconds() for name in self.moments if name != "doors"}
        return shares | {"the rest": 1 - sum(shares.values())}

    def _total(self, name: str) -> float:
        return sum(self.clock.between(*pair) for pair in self.moments[name])


def look_inside(methods: list[Method], device: torch.device, clock: Clock, compiled: bool) -> None:
    """All that is measured or counted besides the seconds of a step."""
    for method in methods:
        found = method.found
        found["peak_bytes"] = peak_bytes(method, device)
        if compiled:
            continue  # compiled code has no doors, and its rows and FLOPs are those of the other runs
        counted = []
        for steps in (1, 2):
            method.rows.clear()
            with FlopCounterMode(display=False) as flops:
                method.sampling(steps)
            counted.append((method.rows.total, flops.get_total_flops()))
        found["evaluations_per_step"], found["flops_per_step"] = (b - a for a, b in zip(*counted, strict=True))
        if method.adapter is not None:
            with Doors(method.adapter, clock) as doors:
                spent = sum(method.sampling(STEPS_INSIDE))
            weights = sum(parameter.nbytes for parameter in method.adapter.parameters())
            found |= {"inside": doors.seconds() / spent, "inside_shares": doors.shares()}
            found["floor_bytes"] = weights + doors.moved // STEPS_INSIDE


def measure(methods: list[Method], rounds: int) -> None:
    for method in methods:
        method.sampling(1)  # loading, autotuning, compiling
    for done in range(rounds):
        for method in methods:
            # The first step of a sampling also looks up the negative prompt's keys and values.
            method.seconds += method.sampling(2)[1:]
        print(f"  round {done + 1} of {rounds}", flush=True)


def rows_of(case: Case, dtype: str, device: str, compiled: bool, methods: list[Method]) -> list[dict]:
    of = {method.name: method for method in methods}
    unguided, cfg = of["unguided"], of["cfg"]
    rows = []
    for method in methods:
        seconds = statistics.median(method.seconds)
        ratios = [a / b for a, b in zip(method.seconds, unguided.seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        row = {
            "model": case.model,
            "size": f"{case.pixels}x{case.pixels}",
            "reduced": case.reduced,
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


def print_table(rows: list[dict]) -> None:
    print(f"{'method':<14} {'rows':>4} {'s/step':>8} {'/unguided':>9} {'quartiles':>13} {'/cfg':>6} {'peak GB':>8} "
          f"{'inside':>7} {'floor':>7} {'floor MB':>8}")  # fmt: skip
    for row in rows:
        low, high = row["ratio_quartiles"]
        inside = f"{row['inside']:7.2%}" if "inside" in row else " " * 7
        floor = f"{row['floor_flops']:7.2%}" if "inside" in row else " " * 7
        moved = f"{row['floor_bytes'] / 1e6:8.0f}" if "floor_bytes" in row else ""
        peak = f"{row['peak_bytes'] / 1e9:8.2f}" if row["peak_bytes"] else " " * 8
        print(f"{row['method']:<14} {row.get('evaluations_per_step', ''):>4} {row['seconds_per_step']:8.4f} "
              f"{row['ratio_to_unguided']:9.3f} {low:6.3f}-{high:6.3f} {row['ratio_to_cfg']:6.3f} {peak} "
              f"{inside} {floor} {moved}")  # fmt: skip


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: what the device computes fast")
    parser.add_argument("--model", choices=("SD 1.5", "SDXL"), help="only this one")
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--compile", action="store_true", help="through ComfyUI's TorchCompileModel")
    parser.add_argument("--quick", action="store_true", help="under five minutes on two CPU cores")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder, if it is not found by itself")
    args = parser.parse_args()
    use_comfyui(args.comfyui, cpu=args.device == "cpu")
    device, clock, rows = torch.device(args.device), Clock(torch.device(args.device)), []
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    for case in (QUICK if args.quick else FULL)[args.device]:
        if args.model not in (None, case.model):
            continue
        for dtype in args.dtype or default_dtypes(device):
            notes = [name, f"{torch.get_num_threads()} threads", dtype]
            notes += ["smaller than people sample at"] * case.reduced + ["compiled"] * args.compile
            print(f"\n{case.model} at {case.pixels}x{case.pixels} ({', '.join(notes)})", flush=True)
            methods = make_methods(case, DTYPES[dtype], device, args.compile, clock)
            measure(methods, args.rounds or case.rounds)
            look_inside(methods, device, clock, args.compile)
            rows += rows_of(case, dtype, args.device, args.compile, methods)
            print_table(rows[-len(methods) :])
            print_shares(rows[-len(methods) :])
            del methods
            release_memory()
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

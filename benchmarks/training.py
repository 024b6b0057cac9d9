"""What a training step costs at the true sizes of SD 1.5 and SDXL, against what the plan foresees.

    python benchmarks/training.py [--device cuda] [--memory-limit GB] [--quick] [--json FILE] [--model NAME ...]
                                  [--minutes N]

Random weights: time and memory do not depend on their values. A step is the trainer's own: the pool's next states, the
teacher, the student forward and backward in the parts that the plan chose, the optimiser, the moving average.

With --memory-limit a GPU has no more memory than that: the rest of it is occupied. `hours_of_default_run` is for the
base's own settings, from the seconds of a step's parts: the teacher, in one step of `reuse`, and the student, in each;
without the measurements and previews of a run. A training that fails, or that does not fit, has a row that says so.

`peak_bytes` on a GPU is the allocator's. On a CPU, whose allocator does not count, it is the sum of the storages that
were alive in the step that was computed (`peak_by`: "counter"). A row without seconds was traced only: nothing of it
was computed or allocated, and its estimate is for a GPU.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_base, benchmark_parser
from comfyui_agd.benchmarks.machine import device_called, device_name, error_text, release_memory
from comfyui_agd.benchmarks.output import write_rows
from comfyui_agd.benchmarks.random_bases import DTYPES, NAMES, TINY_PIXELS, RandomBase
from comfyui_agd.examples.toy.tables import Column, console_table

PARTS = ("rollout", "teacher", "student", "backward", "optimiser")
USUAL = ("SD 1.5", "SDXL")


@dataclass(frozen=True)
class MeasuredTraining:
    """`steps` is how many are timed; without any the training is only traced. `frames`: of a video's latents."""

    model: str
    width: int
    height: int
    dtype: str
    batch: int
    steps: int = 0
    checkpointing: str = "auto"
    frames: int = 1
    tiny: bool = False

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}" + (f", {4 * self.frames - 3} frames" if self.frames > 1 else "")


def _sdxl(dtype: str, batch: int, steps: int = 0, checkpointing: str = "auto") -> MeasuredTraining:
    return MeasuredTraining("SDXL", 1024, 1024, dtype, batch, steps, checkpointing)


TRACED = [
    _sdxl(dtype, batch, checkpointing=checkpointing)
    for dtype in ("bf16", "fp8")
    for batch in (1, 4)
    for checkpointing in ("off", "on")
]
_LARGE = [
    MeasuredTraining("Qwen-Image", 1328, 1328, "fp8", 4, steps=3),
    MeasuredTraining("Qwen-Image", 1328, 1328, "bf16", 4, steps=3),
    MeasuredTraining("Wan 2.2 14B", 832, 480, "fp8", 4, steps=3),
    MeasuredTraining("Wan 2.2 14B", 832, 480, "bf16", 4, steps=3),
    MeasuredTraining("Wan 2.2 14B", 832, 480, "fp8", 1, steps=2, frames=21),
]
CASES = {
    "cpu": [
        MeasuredTraining("SD 1.5", 256, 256, "fp32", 1, steps=3),
        MeasuredTraining("SD 1.5", 256, 256, "fp32", 1, 1, "on"),
        *TRACED,
        *_LARGE,
    ],
    # The default run first.
    "cuda": [
        MeasuredTraining("SD 1.5", 512, 512, "bf16", 4, steps=20),
        _sdxl("bf16", 4, steps=10),
        _sdxl("fp8", 4, steps=10),
        _sdxl("bf16", 1, steps=10),
        _sdxl("bf16", 1, 10, "on"),
        _sdxl("fp8", 1, steps=10),
        *_LARGE,
    ],
}
QUICK = {
    "cpu": [MeasuredTraining("SD 1.5", 256, 256, "fp32", 1, steps=1), *TRACED[:4]],
    "cuda": [MeasuredTraining("SD 1.5", 512, 512, "bf16", 4, steps=5), _sdxl("bf16", 1, steps=5)],
}


class RandomEncoder:
    """Stands in for a base's text encoder."""

    def __init__(self, base: RandomBase):
        self.base, self.encoded = base, 0

    def tokenize(self, prompt: str) -> str:
        return prompt

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        self.encoded += 1
        return self.base.prompt(self.encoded)


def make_model(case: MeasuredTraining, device: torch.device):
    from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel

    base = RandomBase(case.model, case.tiny)
    return ComfyModel(base.patcher(case.dtype, device), RandomEncoder(base), frames=case.frames)


def prompts_of(model):
    """What to plan with: all prompts are equally long."""
    from comfyui_agd.training.plan import ExamplePrompts

    (prompt,) = model.text_encoder.encode(["a prompt"])
    return ExamplePrompts(prompt, prompt)


def model_on_meta(name: str, dtype: str):
    """The model in its true size, which takes no memory."""
    from comfyui_agd.tests.support.checkpoints import on_meta

    model = on_meta(name, *DTYPES[dtype])
    for layer in (model.diffusion_model.input_blocks[0][0], model.diffusion_model.out[-1]):
        # The base's fingerprint is made of these.
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight, device="cpu"), requires_grad=False)
    return model


@functools.cache
def traced_model(name: str, dtype: str):
    """(one that traces each cost once, what to plan with). It is on no device: what it computes a second is unknown."""
    import comfy.model_patcher

    from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel

    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model_on_meta(name, dtype), load_device=cpu, offload_device=cpu)
    model = ComfyModel(patcher, RandomEncoder(RandomBase(name)))
    memory = model.memory
    memory.trace_student, memory.trace_base = functools.cache(memory.trace_student), functools.cache(memory.trace_base)
    memory.matmul_rate = lambda: 0.0
    return model, prompts_of(model)


def config_of(case: MeasuredTraining, base):
    """Of a base, `base`. Short trajectories, so that filling the pool takes as long as a few steps."""
    from comfyui_agd.training.presets import settings_for

    short = {"reuse": 1, "pool": 1, "steps_min": 2, "steps_max": 3}
    sizes = {"width": case.width, "height": case.height, "frames": case.frames}
    return settings_for(base, {"batch": case.batch, "checkpointing": case.checkpointing, **sizes, **short})


@dataclass
class PartTimer:
    """Seconds by name. A part that runs inside another is taken out of it."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    inside: float = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            start, before, self.inside = self.now(), self.inside, 0.0
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.now() - start
                self.seconds[name] += spent - self.inside
                self.inside = before + spent

        return run

    def clear(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)


def new_training(model, config, plan):
    """What `train` makes for these settings: (the step, the state that it changes)."""
    from comfyui_agd.training.distributed import Ranks
    from comfyui_agd.training.memory import BothPredictions
    from comfyui_agd.training.model import EncodedPrompts
    from comfyui_agd.training.pool import TrajectoryPool
    from comfyui_agd.training.run_setup import new_adapter
    from comfyui_agd.training.run_state import RunState
    from comfyui_agd.training.training_step import TrainingStep

    denoiser, encoder, memory = model.denoiser, model.text_encoder, model.memory
    prompts = EncodedPrompts(encoder.encode(["a prompt"] * 4), encoder.encode([""], "negative"))
    both = BothPredictions(denoiser, memory, plan.teacher_rows)
    pool = TrajectoryPool(denoiser, prompts, config, range(config.batch), both)
    unconditional = encoder.context(prompts.negative[0])
    adapter_config = config.adapter_config(model.base, prompt_tokens=len(unconditional))
    adapter = new_adapter(adapter_config, config.seed, unconditional, denoiser.device)
    step = TrainingStep(denoiser, memory, prompts, config, Ranks(), plan.micro_batch)
    return step, RunState.begin(adapter, pool, config.learning_rate)


def timed_step(step, state, timer: PartTimer) -> Callable[[], None]:
    """A function that takes a step of training, and times its parts."""
    denoiser, pool = step.denoiser, state.source
    denoiser.denoise = timer.timed("teacher", denoiser.denoise)
    denoiser.student = timer.timed("student", denoiser.student)
    pool.next, pool.advance = timer.timed("rollout", pool.next), timer.timed("rollout", pool.advance)
    step.gradients = timer.timed("backward", step.gradients)
    step.optimise = timer.timed("optimiser", step.optimise)
    step.update_average = timer.timed("optimiser", step.update_average)
    step.check = lambda *_: None  # of random weights any loss is as good as another
    return lambda: step(state, step.config.iterations)


def peak_of(step: Callable[[], None], memory, parameters: int) -> int:
    """The most memory during a step: the allocator's on a GPU, counted on a CPU."""
    if memory.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(memory.device)
        step()
        return torch.cuda.max_memory_allocated(memory.device)
    from comfyui_agd.agd_core.comfyui.model.tracing import Counter

    with Counter() as counter:
        step()
    # Parameters, the optimiser's moments and the average exist before a step, like the base; gradients are made in it.
    return memory.base_bytes() + 4 * 4 * parameters + counter.peak_bytes


def take_steps(model, config, plan, count: int) -> tuple[int, dict[str, float]]:
    """(peak bytes, seconds of a step by part)."""
    timer = PartTimer(model.denoiser.device)
    with model.denoiser.session(checkpointing=plan.checkpointing, memory=plan.reserve):
        training_step, state = new_training(model, config, plan)
        step = timed_step(training_step, state, timer)
        step()  # autotuning, and the optimiser's state
        timer.clear()
        for _ in range(count):
            step()
        seconds = {name: spent / count for name, spent in timer.seconds.items()}
        return peak_of(step, model.memory, plan.adapter_parameters), seconds


def described(case: MeasuredTraining) -> dict:
    """What a row says of what was asked for."""
    asked = {"model": case.model, "size": case.size, "dtype": case.dtype, "batch": case.batch}
    return asked | {"asked_checkpointing": case.checkpointing} | ({"tiny": True} if case.tiny else {})


def row_of(case: MeasuredTraining, device: torch.device, base, plan, peak: int | None, parts: dict[str, float]) -> dict:
    seconds = sum(parts.values()) / case.batch if parts else None
    return described(case) | {
        "device": device.type if parts else None,
        "micro_batch": plan.micro_batch,
        "teacher_rows": plan.teacher_rows,
        "checkpointing": plan.checkpointing,
        "base_bytes": plan.base_bytes,
        "base_bytes_on_device": plan.base_bytes_on_device,
        "adapter_parameters": plan.adapter_parameters,
        "memory_limit": plan.memory,
        "peak_bytes": peak,
        "peak_by": ("allocator" if device.type == "cuda" else "counter") if parts else None,
        "estimated_peak_bytes": plan.peak_bytes,
        "seconds_per_sample": seconds,
        "samples_per_hour": 3600 / seconds if seconds else None,
        "seconds_of_a_step": parts or None,
        "hours_of_default_run": hours_of_default_run(case, base, parts) if parts else None,
    }


def hours_of_default_run(case: MeasuredTraining, base, parts: dict[str, float]) -> float | None:
    """None where a step was of another batch."""
    from comfyui_agd.training.presets import settings_for

    default = settings_for(base, {})
    if case.batch != default.batch:
        return None
    teacher = parts["rollout"] + parts["teacher"]
    student = parts["student"] + parts["backward"] + parts["optimiser"]
    return default.iterations * (teacher / default.reuse + student) / 3600


def measure(case: MeasuredTraining, device: torch.device, memory: int | None, occupied: int) -> dict:
    """`memory`: what a plan may use; `occupied`: of the device, by what isn't training."""
    from comfyui_agd.training.plan import plan as plan_of

    if not case.steps:
        traced, prompts = traced_model(case.model, case.dtype)
        plan = plan_of(traced, config_of(case, traced.base), memory, prompts)
        return row_of(case, device, traced.base, plan, None, {})
    model = make_model(case, device)
    config = config_of(case, model.base)
    plan = plan_of(model, config, memory, prompts_of(model))
    peak, parts = take_steps(model, config, plan, case.steps)
    return row_of(case, device, model.base, plan, peak - occupied, parts)


def _value(key: str, form: str, factor: float = 1) -> Callable[[dict], str]:
    return lambda row: format(row[key] * factor, form) if row.get(key) else ""


_COLUMNS = (
    Column("model", lambda row: row["model"], -12),
    Column("size", lambda row: row["size"], -20),
    Column("dtype", lambda row: row["dtype"], -5),
    Column("batch", _value("batch", "d"), 6),
    Column("micro", _value("micro_batch", "d"), 6),
    Column("checkpointing", lambda row: {True: "yes", False: "no"}.get(row.get("checkpointing"), ""), 14),
    Column("base there", _value("base_bytes_on_device", ".2f", 1e-9), 11),
    Column("peak", _value("peak_bytes", ".2f", 1e-9), 7),
    Column("est.", _value("estimated_peak_bytes", ".2f", 1e-9), 7),
    Column("s/sample", _value("seconds_per_sample", ".3f"), 12),
    Column("samples/h", _value("samples_per_hour", ".0f"), 11),
    Column("h, default", _value("hours_of_default_run", ".2f"), 11),
    Column("  failed", lambda row: f"  {row.get('failed', '')[:60]}", -10),
)


def print_parts(row: dict) -> None:
    parts = row.get("seconds_of_a_step") or {}
    whole = sum(parts.values())
    if parts:
        split = ", ".join(f"{name} {spent:.2f} s ({spent / whole:.0%})" for name, spent in parts.items())
        print(f"        {split}", flush=True)


def unload_models() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    release_memory()
    comfy.model_management.soft_empty_cache()


def memory_of(device: torch.device, limit: float | None) -> tuple[int | None, torch.Tensor]:
    """(the bytes that a plan may use, what occupies all others of a GPU). None is no limit."""
    memory = int(limit * 1e9) if limit else None
    if device.type == "cpu":
        return memory, torch.empty(0)
    free, _ = torch.cuda.mem_get_info(device)
    memory = min(free, memory or free)
    return memory, torch.empty(free - memory, dtype=torch.uint8, device=device)


def chosen_cases(args: argparse.Namespace) -> list[MeasuredTraining]:
    found = [case for case in (QUICK if args.quick else CASES)[args.device] if case.model in (args.model or USUAL)]
    if args.tiny:
        tiny = {"width": TINY_PIXELS, "height": TINY_PIXELS, "dtype": "fp32", "steps": 1, "tiny": True}
        return list(dict.fromkeys(replace(case, **tiny, frames=min(case.frames, 2)) for case in found))
    return found


def measured(args: argparse.Namespace) -> Iterator[dict]:
    """A row per training, each as soon as it is measured."""
    device, until = device_called(args.device), time.monotonic() + 60 * (args.minutes or 1e6)
    memory, occupied = memory_of(device, args.memory_limit)
    for case in chosen_cases(args):
        if time.monotonic() > until:
            yield described(case) | {"failed": "no time was left to begin it"}
            continue
        try:
            row = measure(case, device, memory, occupied.nbytes)
        except Exception as error:
            row = described(case) | {"failed": error_text(error), "memory_limit": memory}
        yield row
        unload_models()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, quick="under five minutes on two CPU cores")
    parser.add_argument("--memory-limit", type=float, metavar="GB", help="train as if the device had no more")
    parser.add_argument("--minutes", type=float, help="begin no more trainings after that long")
    add_base(parser, NAMES)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    use_comfyui(args.comfyui, cpu=args.device == "cpu")
    threads = torch.get_num_threads()
    print(f"{device_name(args.device)}, {threads} threads; GB at the peak, measured and estimated")
    rows: list[dict] = []

    def kept() -> Iterator[dict]:
        for row in measured(args):
            rows.append(row)
            yield row

    for line in console_table(_COLUMNS, kept()):
        print(line, flush=True)
        if rows:
            print_parts(rows[-1])
            if args.json:
                write_rows(args.json, rows)


if __name__ == "__main__":
    main()

"""What a training step costs at the true sizes of SD 1.5 and SDXL, against what the plan foresees.

    python benchmarks/training.py [--device cuda] [--memory-limit GB] [--quick] [--json FILE]

Random weights: time and memory do not depend on their values. A step is the trainer's own: the pool's next states, the
teacher, the student forward and backward in the parts that the plan chose, the optimiser, the moving average.

`peak_bytes` on a GPU is the allocator's. On a CPU, whose allocator does not count, it is the sum of the storages that
were alive in the step that was computed (`peak_by`: "counter"). A row without seconds was traced only: nothing of it
was computed or allocated, and its estimate is for a GPU.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui
from comfyui_agd.benchmarks.command_line import add_base, benchmark_parser
from comfyui_agd.benchmarks.machine import device_name, release_memory
from comfyui_agd.benchmarks.output import write_rows
from comfyui_agd.examples.toy.tables import Column, console_table

# How weights are stored, and what they are cast to for computing.
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
}
POOLED = 1280
PARTS = ("rollout", "teacher", "student", "backward", "optimiser")


@dataclass(frozen=True)
class MeasuredTraining:
    """`steps` is how many are timed; without any the training is only traced."""

    model: str
    pixels: int
    dtype: str
    batch: int
    steps: int = 0
    checkpointing: str = "auto"


TRACED = [
    MeasuredTraining("SDXL", 1024, dtype, batch, checkpointing=checkpointing)
    for dtype in ("bf16", "fp8")
    for batch in (1, 4)
    for checkpointing in ("off", "on")
]
CASES = {
    "cpu": [
        MeasuredTraining("SD 1.5", 256, "fp32", 1, steps=3),
        MeasuredTraining("SD 1.5", 256, "fp32", 1, 1, "on"),
        *TRACED,
    ],
    "cuda": [
        MeasuredTraining("SD 1.5", 512, "bf16", 4, steps=20),
        MeasuredTraining("SDXL", 1024, "bf16", 1, steps=20),
        MeasuredTraining("SDXL", 1024, "bf16", 1, 20, "on"),
        MeasuredTraining("SDXL", 1024, "bf16", 4, steps=10),
        MeasuredTraining("SDXL", 1024, "fp8", 1, steps=10),
    ],
}
QUICK = {
    "cpu": [MeasuredTraining("SD 1.5", 256, "fp32", 1, steps=1), *TRACED[:4]],
    "cuda": [MeasuredTraining("SD 1.5", 512, "bf16", 4, steps=5), MeasuredTraining("SDXL", 1024, "bf16", 1, steps=5)],
}


class RandomEncoder:
    """Stands in for a CLIP: prompts of 77 random tokens."""

    def __init__(self, width: int):
        self.width, self.generator = width, torch.Generator().manual_seed(1)

    def tokenize(self, prompt: str) -> str:
        return prompt

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        pooled = torch.randn(1, POOLED, generator=self.generator)
        return [[torch.randn(1, 77, self.width, generator=self.generator), {"pooled_output": pooled}]]


def make_model(model, device: torch.device):
    import comfy.model_patcher

    from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel

    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
    return ComfyModel(patcher, RandomEncoder(model.model_config.unet_config["context_dim"]))


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
    model = make_model(model_on_meta(name, dtype), torch.device("cpu"))
    memory = model.memory
    memory.trace_student, memory.trace_base = functools.cache(memory.trace_student), functools.cache(memory.trace_base)
    memory.matmul_rate = lambda: 0.0
    return model, prompts_of(model)


def config_of(case: MeasuredTraining):
    """Short trajectories, so that filling the pool takes as long as a few steps."""
    from comfyui_agd.training.config import TrainConfig

    return TrainConfig(
        batch=case.batch,
        width=case.pixels,
        height=case.pixels,
        reuse=1,
        pool=1,
        steps_min=2,
        steps_max=3,
        checkpointing=case.checkpointing,
    )


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
    adapter_config = config.adapter_config(model.base, prompt_tokens=77)
    adapter = new_adapter(adapter_config, config.seed, encoder.context(prompts.negative[0]), denoiser.device)
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


def row_of(case: MeasuredTraining, device: torch.device, plan, peak: int | None, parts: dict[str, float]) -> dict:
    seconds = sum(parts.values()) / case.batch if parts else None
    return {
        "model": case.model,
        "size": f"{case.pixels}x{case.pixels}",
        "device": device.type if parts else None,
        "dtype": case.dtype,
        "batch": case.batch,
        "micro_batch": plan.micro_batch,
        "teacher_rows": plan.teacher_rows,
        "checkpointing": plan.checkpointing,
        "base_bytes": plan.base_bytes,
        "base_bytes_on_device": plan.base_bytes_on_device,
        "adapter_parameters": plan.adapter_parameters,
        "peak_bytes": peak,
        "peak_by": ("allocator" if device.type == "cuda" else "counter") if parts else None,
        "estimated_peak_bytes": plan.peak_bytes,
        "seconds_per_sample": seconds,
        "samples_per_hour": 3600 / seconds if seconds else None,
        "seconds_of_a_step": parts or None,
    }


def measure(case: MeasuredTraining, device: torch.device, memory: int | None) -> dict:
    from comfyui_agd.tests.support.checkpoints import random_model
    from comfyui_agd.training.plan import plan as plan_of

    config = config_of(case)
    if not case.steps:
        traced, prompts = traced_model(case.model, case.dtype)
        return row_of(case, device, plan_of(traced, config, memory, prompts), None, {})
    model = make_model(random_model(case.model, torch.device("cpu"), *DTYPES[case.dtype]), device)
    plan = plan_of(model, config, memory, prompts_of(model))
    peak, parts = take_steps(model, config, plan, case.steps)
    return row_of(case, device, plan, peak, parts)


def _gigabytes(key: str) -> Callable[[dict], str]:
    return lambda row: f"{row[key] / 1e9:.2f}" if row[key] else ""


def _if_timed(key: str, form: str) -> Callable[[dict], str]:
    return lambda row: format(row[key], form) if row[key] else ""


_COLUMNS = (
    Column("model", lambda row: row["model"], -8),
    Column("size", lambda row: row["size"], -11),
    Column("dtype", lambda row: row["dtype"], -5),
    Column("batch", lambda row: str(row["batch"]), 6),
    Column("micro", lambda row: str(row["micro_batch"]), 6),
    Column("checkpointing", lambda row: "yes" if row["checkpointing"] else "no", 14),
    Column("peak", _gigabytes("peak_bytes"), 7),
    Column("est.", _gigabytes("estimated_peak_bytes"), 7),
    Column("s/sample", _if_timed("seconds_per_sample", ".3f"), 12),
    Column("samples/h", _if_timed("samples_per_hour", ".0f"), 11),
)


def print_parts(row: dict) -> None:
    parts = row["seconds_of_a_step"] or {}
    whole = sum(parts.values())
    if parts:
        split = ", ".join(f"{name} {spent:.2f} s ({spent / whole:.0%})" for name, spent in parts.items())
        print(f"        {split}", flush=True)


def unload_models() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    release_memory()
    comfy.model_management.soft_empty_cache()


def memory_of(device: torch.device, limit: float | None) -> int | None:
    """The bytes that a plan may use; on a GPU the allocator then refuses more. None is no limit."""
    if device.type == "cpu":
        return int(limit * 1e9) if limit else None
    free, total = torch.cuda.mem_get_info(device)
    if limit:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total), device)
    return min(free, int(limit * 1e9)) if limit else free


def measured(args: argparse.Namespace) -> Iterator[dict]:
    """A row per training, each as soon as it is measured."""
    device = torch.device(args.device)
    memory = memory_of(device, args.memory_limit)
    for case in (QUICK if args.quick else CASES)[args.device]:
        if args.model in (None, case.model):
            yield measure(case, device, memory)
            unload_models()


def main() -> None:
    parser = benchmark_parser(__doc__, quick="under five minutes on two CPU cores")
    parser.add_argument("--memory-limit", type=float, metavar="GB", help="train as if the device had no more")
    add_base(parser)
    args = parser.parse_args()
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

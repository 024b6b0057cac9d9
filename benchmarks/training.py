"""What a training step costs at the true sizes of SD 1.5 and SDXL, against what the plan foresees.

    python benchmarks/training.py [--device cuda] [--memory-limit GB] [--quick] [--json FILE]

Random weights: time and memory do not depend on their values. A step is the trainer's own: the pool's next states, the
teacher, the student forward and backward in the parts that the plan chose, the optimiser, the moving average.

`peak_bytes` on a GPU is the allocator's. On a CPU, whose allocator tells nothing, it is the sum of the storages that
were alive in the step that was computed (`peak_by`: "counter"). A row without seconds was traced only: nothing of it
was computed or allocated, and its estimate is for a GPU.
"""

import argparse
import ctypes
import functools
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from comfyui_agd.agd_core.comfyui.runtime import use_comfyui

# How weights are stored, and what they are cast to for computing.
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
}
POOLED = 1280
PARTS = ("rollout", "teacher", "student", "backward", "optimiser")


@dataclass(frozen=True)
class Case:
    """A training to look at. `steps` is how many are timed; without any it is only traced."""

    model: str
    pixels: int
    dtype: str
    batch: int
    steps: int = 0
    checkpointing: str = "auto"


TRACED = [
    Case("SDXL", 1024, dtype, batch, checkpointing=checkpointing)
    for dtype in ("bf16", "fp8")
    for batch in (1, 4)
    for checkpointing in ("off", "on")
]
CASES = {
    "cpu": [Case("SD 1.5", 256, "fp32", 1, steps=3), Case("SD 1.5", 256, "fp32", 1, 1, "on"), *TRACED],
    "cuda": [
        Case("SD 1.5", 512, "bf16", 4, steps=20),
        Case("SDXL", 1024, "bf16", 1, steps=20),
        Case("SDXL", 1024, "bf16", 1, 20, "on"),
        Case("SDXL", 1024, "bf16", 4, steps=10),
        Case("SDXL", 1024, "fp8", 1, steps=10),
    ],
}
QUICK = {
    "cpu": [Case("SD 1.5", 256, "fp32", 1, steps=1), *TRACED[:4]],
    "cuda": [Case("SD 1.5", 512, "bf16", 4, steps=5), Case("SDXL", 1024, "bf16", 1, steps=5)],
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
    trainable = ComfyModel(patcher, RandomEncoder(model.model_config.unet_config["context_dim"]))
    trainable.text_encoder.encode(["a prompt"])
    return trainable


def model_of(name: str, dtype: str, device: str):
    """The model in its true size: with random weights, or on the meta device, where they take no memory."""
    from comfyui_agd.tests.support.checkpoints import _UNET, RandomWeights, detect, names_and_shapes

    state, weights = names_and_shapes(name), RandomWeights(0)
    config = detect(state)
    config.set_inference_dtype(*DTYPES[dtype])
    model = config.get_model(state, _UNET, device=device)
    if device == "meta":
        for layer in (model.diffusion_model.input_blocks[0][0], model.diffusion_model.out[-1]):
            # The base's fingerprint is made of these.
            layer.weight = nn.Parameter(torch.zeros_like(layer.weight, device="cpu"), requires_grad=False)
        return model
    for key, parameter in model.diffusion_model.named_parameters():
        pieces = weights.pieces(key, parameter.shape, parameter.dtype)
        parameter.data = torch.cat(list(pieces)).view(parameter.shape)
    return model


@functools.cache
def traced_model(name: str, dtype: str):
    """One that traces each cost once. It is on no device, so that what it computes a second is unknown."""
    model = make_model(model_of(name, dtype, "meta"), torch.device("cpu"))
    memory = model.memory
    memory.trace_student, memory.trace_base = functools.cache(memory.trace_student), functools.cache(memory.trace_base)
    memory.matmul_rate = lambda: 0.0
    return model


def config_of(case: Case):
    """Short trajectories, so that filling the pool takes as long as a few steps."""
    from comfyui_agd.training.config import TrainConfig

    return TrainConfig(
        batch=case.batch,
        width=case.pixels,
        height=case.pixels,
        pool=1,
        steps_min=2,
        steps_max=3,
        checkpointing=case.checkpointing,
    )


@dataclass
class Watch:
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
    from comfyui_agd.training.step import TrainingStep

    denoiser, encoder, memory = model.denoiser, model.text_encoder, model.memory
    prompts = EncodedPrompts(encoder.encode(["a prompt"] * 4), encoder.encode([""], "negative"))
    both = BothPredictions(denoiser, memory, plan.teacher_rows)
    pool = TrajectoryPool(denoiser, prompts, config, range(config.batch), both)
    adapter_config = config.adapter_config(model.base, prompt_tokens=77)
    adapter = new_adapter(adapter_config, config.seed, encoder.context(prompts.negative[0]), denoiser.device)
    step = TrainingStep(denoiser, memory, prompts, config, Ranks(), plan.micro_batch)
    return step, RunState.begin(adapter, pool, config.learning_rate)


def timed_step(step, state, watch: Watch) -> Callable[[], None]:
    """A function that takes a step of training, and times its parts."""
    denoiser, pool = step.denoiser, state.source
    denoiser.denoise = watch.timed("teacher", denoiser.denoise)
    denoiser.student = watch.timed("student", denoiser.student)
    pool.next, pool.advance = watch.timed("rollout", pool.next), watch.timed("rollout", pool.advance)
    step.gradients = watch.timed("backward", step.gradients)
    step.optimise = watch.timed("optimiser", step.optimise)
    step.update_average = watch.timed("optimiser", step.update_average)
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
    watch = Watch(model.denoiser.device)
    with model.denoiser.session(checkpointing=plan.checkpointing, memory=plan.reserve):
        training_step, state = new_training(model, config, plan)
        state.source.fill()
        step = timed_step(training_step, state, watch)
        step()  # autotuning, and the optimiser's state
        watch.clear()
        for _ in range(count):
            step()
        seconds = {name: spent / count for name, spent in watch.seconds.items()}
        return peak_of(step, model.memory, plan.adapter_parameters), seconds


def row_of(case: Case, device: torch.device, plan, peak: int | None, parts: dict[str, float]) -> dict:
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


def look_at(case: Case, device: torch.device, memory: int | None) -> dict:
    from comfyui_agd.training.plan import plan as plan_of

    config = config_of(case)
    if not case.steps:
        return row_of(case, device, plan_of(traced_model(case.model, case.dtype), config, memory), None, {})
    model = make_model(model_of(case.model, case.dtype, "cpu"), device)
    plan = plan_of(model, config, memory)
    peak, parts = take_steps(model, config, plan, case.steps)
    return row_of(case, device, plan, peak, parts)


def print_row(row: dict) -> None:
    def gigabytes(count: int | None) -> str:
        return f"{count / 1e9:6.2f}" if count else " " * 6

    seconds = f"{row['seconds_per_sample']:9.3f} {row['samples_per_hour']:8.0f}" if row["seconds_per_sample"] else ""
    parts = row["seconds_of_a_step"] or {}
    whole = sum(parts.values())
    split = ", ".join(f"{name} {spent:.2f} s ({spent / whole:.0%})" for name, spent in parts.items())
    print(
        f"{row['model']:<7} {row['size']:<10} {row['dtype']:<5} {row['batch']:>5} {row['micro_batch']:>5} "
        f"{'yes' if row['checkpointing'] else 'no':>10} {gigabytes(row['peak_bytes'])} "
        f"{gigabytes(row['estimated_peak_bytes'])}    {seconds}",
        flush=True,
    )
    if split:
        print(f"        {split}", flush=True)


def release_memory() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def memory_of(device: torch.device, limit: float | None) -> int | None:
    """The bytes that a plan may use; on a GPU the allocator then refuses more. None is no limit."""
    if device.type == "cpu":
        return int(limit * 1e9) if limit else None
    free, total = torch.cuda.mem_get_info(device)
    if limit:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total), device)
    return min(free, int(limit * 1e9)) if limit else free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=tuple(CASES))
    parser.add_argument("--memory-limit", type=float, metavar="GB", help="train as if the device had no more")
    parser.add_argument("--model", choices=("SD 1.5", "SDXL"), help="only this one")
    parser.add_argument("--quick", action="store_true", help="under five minutes on two CPU cores")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder, if it is not found by itself")
    args = parser.parse_args()
    use_comfyui(args.comfyui, cpu=args.device == "cpu")
    device, rows = torch.device(args.device), []
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads; GB at the peak, measured and estimated")
    print("model   size       dtype batch micro checkpoint   peak    est.    s/sample  samples/h")
    memory = memory_of(device, args.memory_limit)
    for case in (QUICK if args.quick else CASES)[args.device]:
        if args.model in (None, case.model):
            rows.append(look_at(case, device, memory))
            print_row(rows[-1])
            release_memory()
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

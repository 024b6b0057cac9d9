"""What a run will cost, before it starts, and how a step is laid out for the device's memory."""

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..agd_core.adapter import Adapter
from ..agd_core.errors import AGDError
from .config import TrainConfig
from .model import Cost, DeviceMemory, Model, ProgressCallback, Prompt, Shape, TextEncoder, no_progress
from .pool import kept_dtype
from .presets import QUALITIES

# What stays unused, for the allocator cuts memory into blocks, and kernels have a workspace that no one counts.
SAFETY = 0.08
# fp32 parameters, gradients, AdamW's two moments, the moving average.
_BYTES_ON_DEVICE = 5 * 4
# A saved state holds parameters, two moments, the moving average and the best average so far.
_BYTES_IN_STATE = 5 * 4
# AdamW on all parameters together makes about two more copies of them while it computes.
_BYTES_OF_OPTIMISER_STEP = 2 * 4
# Of free system memory, what prompts and batches may take: the rest is for saving, and for other programs.
_OF_SYSTEM = 0.9
# Shares of a large matrix product's rate that trainings reach: the best and the worst case of an estimate.
_ACHIEVED = (0.7, 0.3)
_UNITS = (("s", 1), ("min", 60), ("h", 3600), ("d", 86400))
_SMALLER = (0.75, 0.5, 0.375, 0.25)
_MENTIONED = 1e9  # bytes of system memory
_UNIT = 64  # pixels: sizes of pictures that every base takes
# How long tracing takes beside tracing the base: 9 seconds and 1 for SDXL.
_TO_TRACE_STUDENT, _TO_TRACE_BASE = 8, 1


class DoesNotFit(AGDError, ValueError):
    """There is too little memory for any way of training."""


@dataclass(frozen=True)
class Plan:
    """Evaluations are rows through the base, those of training itself: measurements and previews come on top.

    `peak_bytes` is what the device will hold at most, `base_bytes_on_device` of it the base's weights; with less than
    `base_bytes` there, the base has to leave `reserve` bytes of the device free (0: it is loaded whole). `other_bytes`,
    `other_bytes_on_device`: of a model of two experts, the weights of the one that isn't trained. `disk_bytes`:
    saved states and the adapter file. `seconds`: what the arithmetic takes at the least; None where that is unknown.

    System memory holds `prompt_bytes` of encoded prompts and `kept_bytes` of the last `kept_batches`, which come again
    with `reuse`: fewer than are `wanted_batches` where these have no place in `system_memory`, which is free.
    """

    adapter_parameters: int
    teacher_evaluations: int
    student_evaluations: int
    disk_bytes: int
    micro_batch: int
    teacher_rows: int
    checkpointing: bool
    base_bytes: int
    base_bytes_on_device: int
    other_bytes: int
    other_bytes_on_device: int
    reserve: int
    peak_bytes: int
    memory: int | None
    seconds: float | None
    prompt_bytes: int = 0
    kept_bytes: int = 0
    kept_batches: int = 0
    wanted_batches: int = 0
    system_memory: int = 0

    def summary(self) -> str:
        """What it takes, in at most 60 characters: a node may show no more."""
        place = "machine" if self.memory is None else "card"
        time = "" if self.seconds is None else f", about {_time_range(self.seconds)}"
        return f"Needs {_gigabytes(self.peak_bytes)}{time} on this {place}."

    def by_quality(self, quality: str) -> str:
        """How long each quality takes, where this plan is of `quality`. "" where that is unknown."""
        if self.seconds is None:
            return ""
        normal = self.seconds / QUALITIES[quality]
        return ", ".join(f"{name} {_time_range(normal * length)}" for name, length in QUALITIES.items())

    def describe(self) -> str:
        """A few lines for `agd train --dry-run` and the log."""
        available = "" if self.memory is None else f" of {_gigabytes(self.memory)}"
        weights = _weights("the base", self.base_bytes_on_device, self.base_bytes)
        if self.other_bytes:
            weights += f"; {_weights('the other expert', self.other_bytes_on_device, self.other_bytes)}"
        twice = ", activations computed twice" if self.checkpointing else ""
        lines = [
            self.summary(),
            f"adapter      {self.adapter_parameters:,} parameters",
            f"evaluations  {self.teacher_evaluations:,} of the teacher, {self.student_evaluations:,} of the student",
            f"memory       {_gigabytes(self.peak_bytes)}{available}, {weights}",
            f"at once      {self.micro_batch} student, {self.teacher_rows} teacher{twice}",
            f"disk         {_gigabytes(self.disk_bytes)}",
        ]
        if self.prompt_bytes + self.kept_bytes >= _MENTIONED or self.kept_batches < self.wanted_batches:
            lines.insert(4, self._system_memory())
        return "\n".join(lines)

    def _system_memory(self) -> str:
        text = (
            f"system       {_gigabytes(self.prompt_bytes + self.kept_bytes)} of the {_gigabytes(self.system_memory)} "
            f"free in system memory, {_gigabytes(self.prompt_bytes)} of them encoded prompts"
        )
        if self.kept_bytes:
            kept = min(self.kept_batches, self.wanted_batches)
            text += f", {_gigabytes(self.kept_bytes)} the last {kept} batches, to reuse"
            text += f" (of {self.wanted_batches}: more don't fit)" if kept < self.wanted_batches else ""
        return text


def _weights(title: str, on_device: int, whole: int) -> str:
    elsewhere = f", {_gigabytes(whole - on_device)} of it stay in system memory" if on_device < whole else ""
    return f"{_gigabytes(on_device)} of them {title}{elsewhere}"


def _time_range(least: float) -> str:
    """About how many seconds it takes, if it can't take less: such as "40 to 90 min"."""
    low, high = (least / share for share in _ACHIEVED)
    unit, length = next((each for each in _UNITS if high < 100 * each[1]), _UNITS[-1])
    low, high = _rounded(low / length), _rounded(high / length)
    return f"{low:g} to {high:g} {unit}" if low < high else f"{low:g} {unit}"


def _rounded(count: float) -> float:
    """No more precise than an estimate is."""
    if count < 3:
        return max(0.1, round(count, 1))
    return round(count) if count < 10 else 5 * round(count / 5)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class _TracingProgress:
    """Reports how much of the tracing is done. How much there is shows as it goes: more is traced where memory is
    short.
    """

    def __init__(self, progress: ProgressCallback, once: bool):
        self._report, self._done = progress, 0
        self._total = (1 if once else 2) * (_TO_TRACE_STUDENT + _TO_TRACE_BASE)

    def watched(self, trace: Callable[..., Cost], takes: int) -> Callable[..., Cost]:
        """`trace`, which takes so long, reported before and after."""

        def traced(*args: Any) -> Cost:
            self._total = max(self._total, self._done + takes)
            self._report(self._done, self._total)
            found = trace(*args)
            self._done += takes
            self._report(self._done, self._total)
            return found

        return traced

    def end(self) -> None:
        self._report(self._total, self._total)


@dataclass(frozen=True)
class ExamplePrompts:
    """Two of a run's prompts, encoded, to count with: memory by its `longest`, for a batch of only such ones may come;
    time by a `usual` one, which is as long as the mean or the next shorter one, so that "at least" is true. `count`,
    `negatives`: how many different ones there are; `system_bytes`: what all of them take, encoded.
    """

    longest: Prompt
    usual: Prompt
    count: int = 0
    negatives: int = 0
    system_bytes: int = 0

    @classmethod
    def of(cls, encoder: TextEncoder, positive: Sequence[str], negative: Sequence[str]) -> "ExamplePrompts":
        """Of texts, one of each at least: all are tokenised, and the two encoded."""
        lengths = {text: encoder.length(text) for text in dict.fromkeys([*positive, *negative])}
        # The teacher evaluates as many of either kind.
        mean = statistics.fmean(statistics.fmean(lengths[text] for text in texts) for texts in (positive, negative))
        usual = max((text for text in lengths if lengths[text] <= mean), key=lengths.__getitem__)
        longest = max(lengths, key=lengths.__getitem__)
        alike = lengths[longest] == lengths[usual]
        first, second = encoder.encode([longest]) * 2 if alike else encoder.encode([longest, usual])
        most, least = encoder.bytes_of(first), encoder.bytes_of(second)
        # Bytes grow evenly with tokens. A text may be a prompt and a negative one, which are encoded apart.
        per_token = 0.0 if alike else (most - least) / (lengths[longest] - lengths[usual])
        prompts, negatives = (list(dict.fromkeys(texts)) for texts in (positive, negative))
        total = sum(least + per_token * (lengths[text] - lengths[usual]) for text in prompts + negatives)
        return cls(first, second, len(prompts), len(negatives), round(total))


class _CostByRows:
    """What a part of a step costs by its rows. Bytes grow evenly with them: where several numbers of rows are weighed
    up, one and two are traced. With `once`, rows are only asked for one number, and that is traced.
    """

    def __init__(self, trace: Callable[[Prompt, int], Cost], prompts: ExamplePrompts, once: bool):
        self._trace, self._prompts, self._once = functools.cache(trace), prompts, once

    def peak_bytes(self, rows: int) -> int:
        if self._once or rows == 1:
            return self._peak_bytes(rows)
        one = self._peak_bytes(1)
        return one + (rows - 1) * (self._peak_bytes(2) - one)

    def _peak_bytes(self, rows: int) -> int:
        return self._trace(self._prompts.longest, rows).peak_bytes

    def flops_per_row(self, rows: int) -> float:
        rows = rows if self._once else 1
        return self._trace(self._prompts.usual, rows).flops / rows


class _Costs:
    """A config's costs on a model. Each is traced when it is first needed, for that takes seconds."""

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        prompts: ExamplePrompts,
        progress: _TracingProgress,
        once: bool = False,
    ):
        self.model, self.config, self.prompts, self.progress = model, config, prompts, progress
        self.memory: DeviceMemory = model.memory
        self.adapter = config.adapter_config(model.base, prompt_tokens=77)
        self.shape = model.denoiser.latent_shape(*max(config.buckets(), key=math.prod))  # the largest
        self.teacher = _CostByRows(progress.watched(self._trace_base, _TO_TRACE_BASE), prompts, once)
        trace_student = progress.watched(self._trace_student, _TO_TRACE_STUDENT)
        self._students = {on: _CostByRows(functools.partial(trace_student, on), prompts, once) for on in (False, True)}

    def _trace_base(self, prompt: Prompt, rows: int) -> Cost:
        return self.memory.trace_base(self.shape, rows, prompt)

    def _trace_student(self, checkpointing: bool, prompt: Prompt, rows: int) -> Cost:
        return self.memory.trace_student(self.adapter, self.shape, rows, checkpointing, prompt)

    def student(self, checkpointing: bool) -> _CostByRows:
        return self._students[checkpointing]

    @functools.cached_property
    def parameters(self) -> int:
        with torch.device("meta"):
            return Adapter(self.adapter).parameter_count()

    def working_bytes(self, micro_batch: int, teacher_rows: int, checkpointing: bool, fetched: int = 0) -> int:
        """What a step takes beside the weights: the adapter's state, and the most that a part of the step needs.

        `fetched`: bytes of weights in system memory that the teacher needs on the device at a time.
        """
        parameters = self.parameters
        parts = (
            self.student(checkpointing).peak_bytes(micro_batch),
            self.teacher.peak_bytes(teacher_rows) + fetched,
            _BYTES_OF_OPTIMISER_STEP * parameters,
        )
        return _BYTES_ON_DEVICE * parameters + max(parts)

    def beside_base(
        self, free: int | None, micro_batch: int, teacher_rows: int, checkpointing: bool
    ) -> tuple[int, int]:
        """(`working_bytes`, bytes of the other expert's weights) on a device with `free` bytes beside the base.

        None is no limit.
        """
        other, rows = self.memory.other_expert_bytes(), (micro_batch, teacher_rows, checkpointing)
        work = self.working_bytes(*rows)
        if not other or free is None or self.memory.other_expert_bytes_on_device(free - work) == other:
            return work, other
        work = self.working_bytes(*rows, fetched=self.memory.largest_block_bytes())
        return work, self.memory.other_expert_bytes_on_device(free - work)


def _halvings(count: int) -> Iterator[int]:
    """count, and each time half of it, down to 1."""
    while count > 1:
        yield count
        count //= 2
    yield 1


def _micro_batches(config: TrainConfig, batch: int) -> Iterator[tuple[int, bool]]:
    """(micro_batch, checkpointing), the preferred first: whole, then checkpointed, then checkpointed in ever smaller
    parts. What the config fixes stays."""
    parts = [min(config.micro_batch, batch)] if config.micro_batch else list(_halvings(batch))
    if config.checkpointing == "off":
        yield from ((rows, False) for rows in parts)
        return
    if config.checkpointing == "auto":
        yield parts[0], False
    yield from ((rows, True) for rows in parts)


@dataclass(frozen=True)
class StepLayout:
    """How a step is evaluated: so many rows of the student and of the base at once, and as it stands in `Plan`.

    `kept_batches`: 0 is as many as the config says.
    """

    micro_batch: int
    teacher_rows: int
    checkpointing: bool
    base_bytes_on_device: int = 0
    other_bytes_on_device: int = 0
    reserve: int = 0
    peak_bytes: int = 0
    kept_batches: int = 0

    @classmethod
    def of_config(cls, config: TrainConfig, rows: int) -> "StepLayout":
        """Without a plan: so many rows at once, unless the config says otherwise."""
        return cls(config.micro_batch or rows, 2 * rows, config.checkpointing == "on")


def _with_base_on_device(
    costs: _Costs, memory: int | None, batch: int, micro_batch: int, checkpointing: bool
) -> StepLayout | None:
    """With all of the base on the device, and as many of the teacher's rows at once as there is memory for."""
    base = costs.memory.base_bytes()
    free = None if memory is None else memory - base
    for teacher_rows in _halvings(2 * batch):
        work, other = costs.beside_base(free, micro_batch, teacher_rows, checkpointing)
        if memory is None or base + work <= memory * (1 - SAFETY):
            return StepLayout(micro_batch, teacher_rows, checkpointing, base, other, 0, base + other + work)
    return None


def rows_that_fit(
    model: Model, shape: Shape, prompt: Prompt, rows: int, memory: int | None, beside: int = 0
) -> tuple[int, int]:
    """For evaluations without gradients of latents of `shape`: as many of `rows` at once as fit beside the whole base
    into `memory` bytes, or else one; and the bytes to leave free for them, as `session` takes them.

    `beside`: bytes that are needed besides. None is no limit.
    """
    if memory is None:
        return rows, 0
    base = model.memory.base_bytes()
    for count in _halvings(rows):
        needed = math.ceil((model.memory.trace_base(shape, count, prompt).peak_bytes + beside) / (1 - SAFETY))
        if base + needed <= memory:
            return count, needed
    return 1, needed + model.memory.largest_block_bytes()


def _smallest(costs: _Costs, batch: int) -> tuple[int, bool, int]:
    """The layout that takes least: micro_batch, checkpointing and the bytes it needs on the device."""
    micro_batch, checkpointing = list(_micro_batches(costs.config, batch))[-1]
    # Without checkpointing autograd keeps the weights that come from system memory, and the whole base ends up there.
    base = costs.memory.largest_block_bytes() if checkpointing else costs.memory.base_bytes()
    return (
        micro_batch,
        checkpointing,
        math.ceil((costs.working_bytes(micro_batch, 1, checkpointing) + base) / (1 - SAFETY)),
    )


def _offloaded(costs: _Costs, memory: int, batch: int) -> StepLayout | None:
    """The smallest layout, with as much of the base on the device as it leaves memory for."""
    micro_batch, checkpointing, reserve = _smallest(costs, batch)
    if not checkpointing or reserve > memory:
        return None
    # What stays unused is a share of the reserve: ComfyUI fills all the rest.
    base, work = min(costs.memory.base_bytes(), memory - reserve), math.ceil(reserve * (1 - SAFETY))
    other = costs.memory.other_expert_bytes_on_device(memory - base - reserve)
    return StepLayout(micro_batch, 1, checkpointing, base, other, reserve, base + other + work)


def _choose(costs: _Costs, memory: int | None, batch: int) -> StepLayout | None:
    for micro_batch, checkpointing in _micro_batches(costs.config, batch):
        found = _with_base_on_device(costs, memory, batch, micro_batch, checkpointing)
        if found is not None:
            return found
    return None if memory is None else _offloaded(costs, memory, batch)


def _visits(config: TrainConfig) -> int:
    """Batches that ask the teacher."""
    return math.ceil(config.iterations / config.reuse)


def _bytes_to_reuse(costs: _Costs, batches: int) -> int:
    """Of the last so many batches, which system memory and a saved state hold for `reuse`: x and both predictions."""
    config = costs.config
    batches = min(batches, _visits(config)) if config.reuse > 1 else 0
    return batches * config.batch * 3 * math.prod(costs.shape) * kept_dtype(costs.model.denoiser.computes_in).itemsize


def _kept_batches(costs: _Costs, ranks: int) -> int:
    """As many of those that the config wants as there is system memory for beside the encoded prompts.

    Raises `DoesNotFit` where these have no place.
    """
    prompts, memory = costs.prompts, int(costs.memory.system_available() * _OF_SYSTEM)
    check_system_memory(prompts, costs.memory, ranks)
    # Of several ranks the first gathers what all have, to save it.
    copies = 1 if ranks == 1 else 2
    free = memory - prompts.system_bytes * ranks
    return next((n for n in _halvings(costs.config.reuse_from) if _bytes_to_reuse(costs, n) * copies <= free), 1)


def check_system_memory(prompts: ExamplePrompts, memory: DeviceMemory, ranks: int = 1) -> None:
    """Raises `DoesNotFit` where system memory has no place for the encoded prompts, of each of `ranks`."""
    needed, free = prompts.system_bytes * ranks, memory.system_available() * _OF_SYSTEM
    if needed > free:
        fit = int((prompts.count + prompts.negatives) * free / needed)
        # Those that are made from few prompts are about as many.
        fewer = max(fit - prompts.negatives, fit // 2, 1)
        raise DoesNotFit(
            f"The encoded prompts take {_gigabytes(needed)} of system memory, and {_gigabytes(free)} is free for "
            f"them; it would fit with {fewer:,} prompts in place of {prompts.count:,} (made prompts in AGD Train "
            "Settings, --prompt-count, or fewer lines)."
        )


def plan(
    model: Model,
    config: TrainConfig,
    memory: int | None,
    prompts: ExamplePrompts,
    *,
    ranks: int = 1,
    progress: ProgressCallback = no_progress,
) -> Plan:
    """What the run of `config` costs on such prompts, and how its steps fit into `memory` bytes on each of `ranks`
    devices.

    None is no limit. Preferred is the whole batch without checkpointing, then with it, then with it in parts, at last
    with a part of the base in system memory. Raises `DoesNotFit`, which names a setting that would. `progress` may
    raise, to stop.
    """
    tracing, batch = _TracingProgress(progress, once=memory is None), max(1, config.batch // ranks)
    costs = _Costs(model, config, prompts, tracing, once=memory is None)
    kept_batches = _kept_batches(costs, ranks)  # before any tracing, for it may refuse
    layout = _choose(costs, memory, batch)
    if layout is None:
        raise DoesNotFit(_refusal(costs, memory or 0, batch))
    teacher, student = evaluations(config)
    parameters = costs.parameters
    kept = _bytes_to_reuse(costs, kept_batches)
    state = parameters * _BYTES_IN_STATE + kept
    found = Plan(
        adapter_parameters=parameters,
        teacher_evaluations=teacher,
        student_evaluations=student,
        disk_bytes=(config.keep_states + 1) * state + parameters * 2 * 4,  # one more state while it is written
        base_bytes=model.memory.base_bytes(),
        other_bytes=model.memory.other_expert_bytes(),
        memory=memory,
        seconds=_seconds(costs, layout, teacher / ranks, student / ranks),
        prompt_bytes=prompts.system_bytes * ranks,
        kept_bytes=kept,
        wanted_batches=min(config.reuse_from, _visits(config)) if config.reuse > 1 else 0,
        system_memory=model.memory.system_available(),
        **vars(replace(layout, kept_batches=kept_batches)),
    )
    tracing.end()
    return found


def evaluations(config: TrainConfig) -> tuple[int, int]:
    """(teacher's, student's) of a run, in rows: both branches of every state visited, and of starting the columns of
    the pool that are. Expected ones, for what is visited is drawn."""
    # A trajectory of n steps starts at one of the phases 0 to n - 1.
    phase = ((config.steps_min + config.steps_max) / 2 - 1) / 2
    columns, visits = max(config.pool, len(config.buckets())), _visits(config)
    started = columns * (1 - (1 - 1 / columns) ** visits)
    return 2 * config.batch * visits + round(2 * config.batch * started * phase), config.batch * config.iterations


def _seconds(costs: _Costs, layout: StepLayout, teacher: float, student: float) -> float | None:
    rate = costs.memory.matmul_rate()
    if not rate > 0:
        return None
    per_student = costs.student(layout.checkpointing).flops_per_row(layout.micro_batch)
    return (teacher * costs.teacher.flops_per_row(layout.teacher_rows) + student * per_student) / rate


def _refusal(costs: _Costs, memory: int, batch: int) -> str:
    config, needed = costs.config, _smallest(costs, batch)[-1]
    smaller = (change for change in _smaller_settings(config) if _has_memory(costs, change, memory, batch))
    found = ", ".join(f"{name} {value}" for name, value in next(smaller, {}).items())
    advice = f"it would fit with {found}" if found else "no smaller pictures or adapter would make it fit"
    size = f" with {config.size_setting} {getattr(config, config.size_setting)}" if config.size_setting else ""
    return (
        f"Training at {config.width}x{config.height}{size} needs {_gigabytes(needed)} on the device, which has "
        f"{_gigabytes(memory)} for it; {advice}."
    )


def _has_memory(costs: _Costs, change: dict[str, Any], memory: int, batch: int) -> bool:
    """Whether the config would with that change."""
    changed = _Costs(costs.model, replace(costs.config, **change), costs.prompts, costs.progress)
    return _smallest(changed, batch)[-1] <= memory


def _smaller_settings(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Changes that make a config take less memory, those that keep the most of it first."""
    memory_only: dict[str, Any] = {"checkpointing": "auto"} if config.checkpointing == "off" else {}
    memory_only |= {"micro_batch": 1} if config.micro_batch > 1 else {}
    sizes = [
        {name: int(share * getattr(config, name) / _UNIT) * _UNIT for name in ("width", "height")} for share in _SMALLER
    ]
    sizes = [sides for sides in sizes if min(sides.values()) > 0]
    name = config.size_setting
    width = getattr(config, name) if name else 0
    widths = [{name: width // part // 4 * 4} for part in (2, 4, 8) if name and width // part >= 4]
    both = [sides | width for sides in sizes[-1:] for width in widths]
    yield from (memory_only | change for change in [{}, *sizes, *widths, *both] if memory_only | change)

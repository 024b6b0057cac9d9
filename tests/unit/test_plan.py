"""How a run is planned, on a base whose costs are simple: so much per row and pixel."""

import contextlib
import math
import re
from dataclasses import dataclass, field, replace

import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.config import BaseInfo
from comfyui_agd.tests.support.small import small_layer
from comfyui_agd.training import plan as planning
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.plan import SAFETY, DoesNotFit, ExamplePrompts, Plan, evaluations

GB = 1e9


@dataclass(frozen=True)
class Cost:
    peak_bytes: int
    flops: int


LAYERS = tuple(small_layer(f"input_{i}_0", f"blocks.{i}", 640, 768) for i in range(8))


@dataclass
class PlainModel:
    """At 512 x 512 the student takes 1 GB per row, checkpointed 0.2 GB, the teacher 0.1 GB, and 0.05 GB besides.

    A prompt, encoded, is its length: all that goes with the rows goes with it, too.
    """

    base: BaseInfo = field(default_factory=lambda: BaseInfo("Plain", "EPS", LAYERS))
    traced: list = field(default_factory=list)
    other: float = 0.0
    system: float = 100.0
    computes_in: torch.dtype = torch.float32

    @property
    def denoiser(self):
        return self

    memory = denoiser

    def latent_shape(self, width, height):
        return 4, height // 8, width // 8

    def system_available(self):
        return int(self.system * GB)

    def base_bytes(self):
        return int(2 * GB)

    def largest_block_bytes(self):
        return int(0.1 * GB)

    def other_expert_bytes(self):
        return int(self.other * GB)

    def other_expert_bytes_on_device(self, free):
        return max(0, min(self.other_expert_bytes(), int(free - 0.2 * GB)))

    def _cost(self, what, shape, rows, prompt, each, flops):
        self.traced.append((what, rows))
        size = prompt * shape[1] * shape[2] / 64**2
        return Cost(int((0.05 + each * rows * size) * GB), int(flops * rows * size))

    def trace_student(self, config, shape, rows, checkpointing, prompt):
        each, flops = (0.2, 4e12) if checkpointing else (1.0, 3e12)
        return self._cost("checkpointed" if checkpointing else "kept", shape, rows, prompt, each, flops)

    def trace_base(self, shape, rows, prompt):
        return self._cost("teacher", shape, rows, prompt, 0.1, 1e12)

    def matmul_rate(self):
        return 1e13


CONFIG = TrainConfig(batch=8, iterations=100, reuse=1, pool=4, steps_min=10, steps_max=20)
ALIKE = ExamplePrompts(1, 1)


def plan(model, config: TrainConfig, memory: float | None, prompts: ExamplePrompts = ALIKE, **options) -> Plan:
    return planning.plan(model, config, memory, prompts, **options)


class Words:
    """A text encoder to which a prompt is as long as it has words, the empty one too."""

    def __init__(self):
        self.encoded: list[str] = []

    def length(self, prompt: str) -> int:
        return 1 + len(prompt.split())

    def encode(self, prompts: list[str]) -> list[int]:
        self.encoded += prompts
        return [self.length(prompt) for prompt in prompts]

    def bytes_of(self, prompt: int) -> int:
        return 10 + 100 * prompt


@pytest.fixture
def model():
    return PlainModel()


def parameters(model, config: TrainConfig = CONFIG) -> int:
    return Adapter(config.adapter_config(model.base, 77)).parameter_count()


def room_for(model, work: float, base: float = 2.0, config: TrainConfig = CONFIG) -> int:
    """Just enough bytes for a step that takes `work` GB beside the adapter's state."""
    return int(((base + work) * GB + 20 * parameters(model, config)) / (1 - SAFETY)) + 2


WHOLE, PARTS = 0.05 + 8 * 1.0, {rows: 0.05 + 0.2 * rows for rows in (8, 4, 2, 1)}


@pytest.mark.parametrize(
    ("work", "micro_batch", "checkpointing"),
    [
        (WHOLE, 8, False),
        (WHOLE - 0.01, 8, True),
        *((work, rows, True) for rows, work in PARTS.items()),
        (PARTS[8] - 0.01, 4, True),
    ],
)
def test_ways_are_preferred_in_order(model, work, micro_batch, checkpointing):
    memory = room_for(model, work)
    found = plan(model, CONFIG, memory)
    assert (found.micro_batch, found.checkpointing) == (micro_batch, checkpointing)
    assert found.base_bytes_on_device == found.base_bytes == model.base_bytes()
    assert found.reserve == 0
    assert found.peak_bytes <= memory * (1 - SAFETY)


def test_without_a_limit_the_batch_is_whole(model):
    found = plan(model, CONFIG, None)
    assert (found.micro_batch, found.teacher_rows, found.checkpointing) == (8, 16, False)
    assert found.peak_bytes == pytest.approx(2 * GB + WHOLE * GB + 20 * parameters(model), rel=1e-6)


@pytest.mark.parametrize("memory", [None, 100 * GB])
def test_what_the_config_fixes_stays(model, memory):
    assert plan(model, replace(CONFIG, checkpointing="on"), memory).checkpointing
    assert plan(model, replace(CONFIG, micro_batch=2), memory).micro_batch == 2
    assert plan(model, replace(CONFIG, checkpointing="off"), room_for(model, 1.1)).micro_batch == 1


def test_the_teacher_takes_as_many_rows_as_fit_beside_the_student(model):
    assert plan(model, CONFIG, room_for(model, 0.05 + 0.1 * 16)).teacher_rows == 16
    assert plan(model, CONFIG, room_for(model, 0.05 + 0.1 * 4)).teacher_rows == 4
    assert plan(model, CONFIG, room_for(model, 0.05 + 0.1 * 2)).teacher_rows == 2


def test_a_part_of_the_base_stays_in_system_memory_at_last(model):
    memory = room_for(model, PARTS[1], base=1.2)
    found = plan(model, CONFIG, memory)
    assert (found.micro_batch, found.teacher_rows, found.checkpointing) == (1, 1, True)
    assert 1.0 * GB < found.base_bytes_on_device < 1.3 * GB
    assert found.base_bytes_on_device + found.reserve == memory
    assert found.base_bytes_on_device < found.peak_bytes < memory
    assert "of it stay in system memory" in found.describe()


def test_the_other_expert_is_on_the_device_as_far_as_it_fits_beside_the_base_and_a_step(model):
    alone, model.other = plan(model, CONFIG, None), 2.0
    whole = plan(model, CONFIG, None)
    assert whole.other_bytes_on_device == whole.other_bytes == 2 * GB
    assert whole.peak_bytes == alone.peak_bytes + 2 * GB
    assert plan(model, CONFIG, int(alone.peak_bytes + 2.3 * GB)).peak_bytes == pytest.approx(whole.peak_bytes, abs=10)
    memory = int(alone.peak_bytes + 1.5 * GB)
    part = plan(model, CONFIG, memory)
    assert part.base_bytes_on_device == part.base_bytes
    assert part.other_bytes_on_device == pytest.approx(1.3 * GB, abs=10)
    assert part.peak_bytes == pytest.approx(memory - 0.2 * GB, abs=10)
    assert "2.0 GB of them the base; 1.3 GB of them the other expert, 0.7 GB of it stay in" in part.describe()


def test_the_other_expert_stays_in_system_memory_with_a_part_of_the_base(model):
    model.other, memory = 2.0, room_for(model, PARTS[1], base=1.2)
    found = plan(model, CONFIG, memory)
    assert 1.0 * GB < found.base_bytes_on_device < 1.3 * GB
    assert found.other_bytes_on_device == 0
    assert found.peak_bytes < memory
    assert "0.0 MB of them the other expert, 2.0 GB of it stay in system memory" in found.describe()


def test_a_block_of_the_other_expert_comes_to_the_device_when_it_is_asked(model):
    memory = room_for(model, PARTS[8])  # as much as the teacher takes for 16 rows
    assert plan(model, CONFIG, memory).teacher_rows == 16
    model.other = 2.0
    assert plan(model, CONFIG, memory).teacher_rows == 8
    assert plan(model, CONFIG, memory + int(0.2 * GB)).teacher_rows == 16


def test_without_checkpointing_no_part_of_the_base_can_stay_behind(model):
    config = replace(CONFIG, checkpointing="off")
    with pytest.raises(DoesNotFit, match=r"it would fit with checkpointing auto\.$"):
        plan(model, config, room_for(model, 1.05, base=1.9))


def advised(error: pytest.ExceptionInfo, config: TrainConfig) -> TrainConfig:
    """`config` changed as the refusal says."""
    changes = re.findall(r"(width|height|hidden|micro_batch|checkpointing) (\w+)", str(error.value).split(";")[1])
    return replace(config, **{name: int(value) if value.isdigit() else value for name, value in changes})


@pytest.mark.parametrize(
    ("config", "work"),
    [
        (CONFIG, 0.25),
        (CONFIG, 0.16),
        (replace(CONFIG, width=1024, height=768), 0.5),
        (replace(CONFIG, width=1024, height=1024, checkpointing="off"), 0.2),
        (replace(CONFIG, micro_batch=8), 0.3),
        (replace(CONFIG, micro_batch=8), 0.2),
        (replace(CONFIG, hidden=512), 0.1),
    ],
)
def test_a_refusal_names_what_is_needed_and_a_setting_that_does_fit(model, config, work):
    memory = room_for(model, work, base=0.05)
    with pytest.raises(DoesNotFit) as error:
        plan(model, config, memory)
    assert re.fullmatch(
        rf"Training at {config.width}x{config.height} with hidden {config.hidden} needs [\d.]+ GB on the device, which "
        rf"has {memory / GB:.1f} GB for it; it would fit with [^.]+\.",
        str(error.value),
    )
    changed = advised(error, config)
    assert changed != config
    assert plan(model, changed, memory).peak_bytes <= memory


def test_a_refusal_says_so_where_nothing_helps(model):
    with pytest.raises(DoesNotFit, match=r"has 0\.0 MB for it; no smaller pictures or adapter would make it fit\.$"):
        plan(model, CONFIG, 1000)


def test_a_smaller_hidden_helps_where_the_adapter_is_what_is_large(model):
    config = replace(CONFIG, width=64, height=64, hidden=512, rank=4)
    memory = room_for(model, 0.06, base=0.1, config=replace(config, hidden=256))
    with pytest.raises(DoesNotFit, match="it would fit with hidden 256"):
        plan(model, config, memory)


def test_evaluations_are_those_that_training_spends(model):
    # 100 steps of 8 states, both branches; 4 columns of 8 that start 7 steps in, on average.
    assert evaluations(CONFIG) == (2 * 8 * 100 + 2 * 8 * 4 * 7, 800)
    # One step starts one column; two take the same one with a probability of 1/4.
    assert evaluations(replace(CONFIG, iterations=1)) == (2 * 8 * 1 + 2 * 8 * 7, 8)
    assert evaluations(replace(CONFIG, iterations=2)) == (2 * 8 * 2 + round(1.75 * 2 * 8 * 7), 16)
    assert evaluations(replace(CONFIG, reuse=4))[0] == 2 * 8 * 25 + 2 * 8 * 4 * 7
    found = plan(model, CONFIG, None)
    assert (found.teacher_evaluations, found.student_evaluations) == evaluations(CONFIG)


def test_seconds_are_the_flops_of_all_evaluations(model):
    found = plan(model, CONFIG, None)
    assert found.seconds == pytest.approx((found.teacher_evaluations * 1e12 + 800 * 3e12) / 1e13)
    twice = plan(model, replace(CONFIG, checkpointing="on"), None)
    assert twice.seconds == pytest.approx((twice.teacher_evaluations * 1e12 + 800 * 4e12) / 1e13)


def test_memory_is_counted_with_the_longest_prompt_and_time_with_a_usual_one(model):
    alike, longer = plan(model, CONFIG, None), plan(model, CONFIG, None, ExamplePrompts(longest=3, usual=1))
    assert longer.peak_bytes - alike.peak_bytes == pytest.approx(2 * 8 * 1.0 * GB)
    assert longer.seconds == alike.seconds
    assert plan(model, CONFIG, room_for(model, WHOLE)).micro_batch == 8
    assert plan(model, CONFIG, room_for(model, WHOLE), ExamplePrompts(3, 1)).checkpointing


@pytest.mark.parametrize(
    ("positive", "negative", "longest", "usual"),
    [
        (["a fox", "an owl"], ["", ""], 3, 1),
        (["one", "one two three", "one two three four five"], ["one two three"], 6, 4),
        (["one"], ["blurry, low quality, text"], 5, 2),
        (["one two", "one two", "one two", "one two three four five six"], ["one two"], 7, 3),
    ],
)
def test_the_longest_and_a_usual_one_are_found_among_prompts_and_negative_prompts(positive, negative, longest, usual):
    encoder = Words()
    found = ExamplePrompts.of(encoder, positive, negative)
    assert (found.longest, found.usual) == (longest, usual)
    assert len(encoder.encoded) == 2


def test_of_prompts_that_are_equally_long_one_is_encoded_and_traced(model):
    encoder = Words()
    assert ExamplePrompts.of(encoder, ["a fox", "an owl"], ["too dark"]) == ExamplePrompts(3, 3, 2, 1, 3 * 310)
    assert len(encoder.encoded) == 1


def test_what_all_prompts_take_is_told_by_two_of_them():
    positive, negative = ["a fox", "one two three four five", "a fox"], ["", "", "a fox"]
    found = ExamplePrompts.of(Words(), positive, negative)
    assert (found.count, found.negatives) == (2, 2)
    assert found.system_bytes == sum(10 + 100 * words for words in (3, 6, 1, 3))


def test_prompts_that_system_memory_has_no_place_for_are_refused_with_how_many_it_has(model):
    prompts = ExamplePrompts(1, 1, count=2000, negatives=400, system_bytes=int(24 * GB))
    model.system = 15.0
    model.traced.clear()
    with pytest.raises(
        DoesNotFit, match=r"take 24\.0 GB of system memory, and 13\.5 GB is free .* with 950 prompts in"
    ):
        plan(model, CONFIG, None, prompts)
    assert model.traced == []
    assert plan(model, CONFIG, None, replace(prompts, count=950, system_bytes=int(13.5 * GB))).kept_batches
    with pytest.raises(DoesNotFit, match=r"48\.0 GB"):
        plan(model, CONFIG, None, prompts, ranks=2)


REUSED = replace(CONFIG, iterations=4000, reuse=4, reuse_from=256, width=2048, height=2048)


def test_fewer_batches_are_kept_to_come_again_where_system_memory_has_no_place_for_all(model):
    each = 3 * 4 * REUSED.batch * math.prod(model.latent_shape(2048, 2048))
    whole = plan(model, REUSED, None)
    assert (whole.kept_batches, whole.kept_bytes) == (256, 256 * each)
    assert "system       6.4 GB of the 100.0 GB free in system memory" in whole.describe()
    model.system = (70 * each + 1e6) / 0.9 / GB
    part = plan(model, REUSED, None)
    assert (part.kept_batches, part.kept_bytes) == (64, 64 * each)
    assert part.describe().splitlines()[4].endswith("1.6 GB the last 64 batches, to reuse (of 256: more don't fit)")
    assert whole.disk_bytes - part.disk_bytes == 192 * each * (REUSED.keep_states + 1)
    assert plan(model, REUSED, None, ranks=2).kept_batches == 32  # the first one gathers what both have
    model.system = 0.0
    assert plan(model, REUSED, None).kept_batches == 1


def test_batches_that_come_again_take_half_where_the_base_computes_in_half_precision(model):
    whole, model.computes_in = plan(model, REUSED, None), torch.bfloat16
    assert plan(model, REUSED, None).kept_bytes == whole.kept_bytes / 2


def test_system_memory_is_mentioned_where_much_of_it_is_needed(model):
    assert "system" not in plan(model, CONFIG, None).describe()


def test_unknown_seconds_are_not_guessed(model, monkeypatch):
    monkeypatch.setattr(model, "matmul_rate", lambda: 0.0)
    found = plan(model, CONFIG, None)
    assert found.seconds is None
    assert found.summary() == "Needs 10.2 GB on this machine."
    assert found.by_quality("normal") == ""


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.01, "0.1 s"),
        (0.1, "0.1 to 0.3 s"),
        (14, "20 to 45 s"),
        (45, "1.1 to 2.5 min"),
        (27 * 60, "40 to 90 min"),
        (1900, "0.8 to 1.8 h"),
        (3600 * 2, "2.9 to 7 h"),
        (3600 * 50, "3 to 7 d"),
    ],
)
def test_the_time_is_a_range_in_few_words(model, seconds, expected):
    found = replace(plan(model, CONFIG, int(24 * GB)), seconds=seconds)
    assert found.summary() == f"Needs 10.2 GB, about {expected} on this card."


def test_the_time_of_each_quality_goes_by_that_of_the_one_that_is_planned(model):
    found = replace(plan(model, CONFIG, None), seconds=1000.0)
    assert found.by_quality("quick") == "quick 25 to 55 min, normal 1.2 to 2.8 h, best 4 to 8 h"
    assert found.by_quality("best") == "quick 2.6 to 6 min, normal 8 to 20 min, best 25 to 55 min"


def test_what_a_node_shows_of_a_plan_has_sixty_characters_a_line(model):
    found = replace(plan(model, CONFIG, int(24 * GB)), peak_bytes=int(123e9))
    for exponent in range(100):
        timed = replace(found, seconds=1.15**exponent)
        assert max(len(timed.summary()), len(timed.by_quality("quick"))) <= 60


def test_the_disk_holds_the_states_and_the_adapter(model):
    few, more = (plan(model, replace(CONFIG, keep_states=count), None).disk_bytes for count in (1, 2))
    assert more - few == 20 * parameters(model)


def test_the_disk_holds_the_visits_to_reuse(model):
    none, all_of_three, two = (
        plan(model, replace(CONFIG, iterations=6, reuse=reuse, reuse_from=kept), None).disk_bytes
        for reuse, kept in ((1, 4), (2, 4), (2, 2))
    )
    visit = 3 * 4 * CONFIG.batch * math.prod(model.latent_shape(CONFIG.width, CONFIG.height))
    assert all_of_three - none == 3 * visit * (CONFIG.keep_states + 1)
    assert all_of_three - two == visit * (CONFIG.keep_states + 1)


def test_devices_share_the_batch_and_the_time(model):
    one, four = plan(model, CONFIG, None), plan(model, CONFIG, None, ranks=4)
    assert four.micro_batch == 2
    assert four.seconds == pytest.approx(one.seconds / 4)
    assert four.teacher_evaluations == one.teacher_evaluations


def test_the_largest_size_counts(model):
    config = replace(CONFIG, aspect_ratios=("1:1", "2:1"))
    shapes, real = [], model.latent_shape
    model.latent_shape = lambda *size: shapes.append(size) or real(*size)
    plan(model, config, None)
    assert shapes == [max(config.buckets(), key=lambda size: size[0] * size[1])]


def test_nothing_is_traced_that_need_not_be(model):
    plan(model, replace(CONFIG, batch=1), None)
    assert sorted(model.traced) == [("kept", 1), ("teacher", 2)]


@pytest.mark.parametrize("work", [None, 10.0, 0.4, 0.06])
def test_planning_reports_before_and_after_every_trace(model, work):
    """Also where more is traced, for memory is short, and where all is refused."""
    reports, traced = [], []

    def progress(done, total):
        reports.append((done, total))
        traced.append(len(model.traced))

    memory = None if work is None else room_for(model, work, base=0.1)
    model.traced.clear()
    with contextlib.suppress(DoesNotFit):
        plan(model, CONFIG, memory, progress=progress)
    assert reports[0][0] == 0
    assert reports == sorted(reports)
    assert all(done <= total for done, total in reports)
    assert sorted(set(traced)) == list(range(len(model.traced) + 1))


def test_the_end_of_planning_is_reported_and_it_can_be_stopped(model):
    reports = []
    plan(model, CONFIG, None, progress=lambda *report: reports.append(report))
    assert reports[-1][0] == reports[-1][1]

    def stop(done, total):
        raise KeyboardInterrupt

    model.traced.clear()
    with pytest.raises(KeyboardInterrupt):
        plan(model, CONFIG, None, progress=stop)
    assert model.traced == []


def test_counting_parameters_takes_no_memory(model):
    assert plan(model, CONFIG, None).adapter_parameters == parameters(model)
    assert torch.empty(0).device.type == "cpu"  # the meta device is not left on


def test_the_description_says_it_all(model):
    text = plan(model, CONFIG, int(24 * GB)).describe()
    assert text.splitlines()[:1] + text.splitlines()[2:5] == [
        "Needs 10.2 GB, about 10 to 25 min on this card.",
        "evaluations  2,048 of the teacher, 800 of the student",
        "memory       10.2 GB of 24.0 GB, 2.0 GB of them the base",
        "at once      8 student, 16 teacher",
    ]

"""On a card that isn't there: nothing is on another device than what it is computed with, and no step waits for it.

Without a card there are no values, so what is computed is another test's. tests/support/card.py says how it is done.
"""

import functools
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as mm
import pytest
import torch

from comfyui_agd import training
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterInfo
from comfyui_agd.agd_core.comfyui.backbones import backbone_of, describe_base
from comfyui_agd.agd_core.comfyui.counting import counted
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.sampler import ComfySampler
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings
from comfyui_agd.agd_core.comfyui.sampling.training_free import apply_training_free
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, of_kind
from comfyui_agd.tests.support.card import CARD, CPU, WAYS, XL, card, model_on_card, with_waits_by_step
from comfyui_agd.tests.support.family_adapters import TinyClip, adapter_of
from comfyui_agd.tests.support.runtime import Prompts, ksampler, latent, random_prompts
from comfyui_agd.tests.support.small import info_for, randomised
from comfyui_agd.tests.support.tiny_families import conditioning, empty_latent
from comfyui_agd.training.assess import AssessConfig, Candidate, PromptTexts, assess
from comfyui_agd.training.gap import Trajectories, evaluate, follow_teacher
from comfyui_agd.training.plan import StepLayout
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import train

# A UNet; one whose image and prompt look at each other; one whose image looks at the prompt.
FAMILIES = (XL, "sd3", "wan2.1-t2v")
OF_TRANSFORMERS = ("delta", "low_rank", "scale")
EVERY_KIND = [(XL, kind) for kind in KINDS] + [(name, kind) for name in FAMILIES[1:] for kind in OF_TRANSFORMERS]
each_family = pytest.mark.parametrize("family", FAMILIES)
# Each family, and each way.
SOME = [(XL, "fp16"), (XL, "offloaded"), ("sd3", "fp8"), ("wan2.1-t2v", "bf16")]
some = pytest.mark.parametrize(("family", "way"), SOME)
each_way = pytest.mark.parametrize("way", WAYS)
Apply = Callable[[Any], Any]  # MODEL -> MODEL


def text(family: str, prompt: str) -> list:
    """CONDITIONING."""
    if family == XL:
        return random_prompts(pooled=1280, seed=zlib.crc32(prompt.encode())).positive
    return conditioning(family, prompt)


class Clip(TinyClip):
    def encode_from_tokens_scheduled(self, tokens: dict[str, list]) -> list:
        if self.name != XL:
            return super().encode_from_tokens_scheduled(tokens)
        return text(XL, "".join(tokens["letters"][0]))


def weights_for(model, family: str, kind: str, **settings) -> tuple[AdapterInfo, dict[str, torch.Tensor]]:
    """An adapter that does something, as from a file."""
    if family != XL:
        return adapter_of(family, kind, **settings)
    small = {"hidden": 8, "encoder_width": 8, "prompt_tokens": 16, **settings}
    info = replace(info_for(describe_base(model.model), kind, **small), negative_mode="used")
    return info, randomised(Adapter(info.config)).state_dict()


def adapted(family: str, kind: str = "delta", guidance: GuidanceSettings = GuidanceSettings(), **settings) -> Apply:
    def apply(model):
        info, weights = weights_for(model, family, kind, **settings)
        return apply_adapter(model, info, weights, guidance, source="the file", notify=pytest.fail)

    return apply


@dataclass(frozen=True)
class Sampled:
    """A sampling that KSampler made: where each of its steps waited for the card, and the rows of each evaluation."""

    steps: list[list[str]]
    rows: list[int]

    def files(self) -> list[dict[str, int]]:
        """Of each step, how often a file waited."""
        return [dict(Counter(_file_of(wait) for wait in step)) for step in self.steps]


def _file_of(wait: str) -> str:
    return wait.split(" at ")[1].split(":")[0]


def sampled(family: str, way: str, apply: Apply, prompts: Prompts | None = None, **settings) -> Sampled:
    """Two steps, of a MODEL as `apply` returns it."""
    model, held = model_on_card(family, WAYS[way]), WAYS[way]
    with card(offloaded=held.offloaded) as on:
        model, steps = with_waits_by_step(apply(model), on)
        model, counter = counted(model)
        at = latent(channels=4) if family == XL else empty_latent(family)
        given = prompts or Prompts(text(family, "a fox"), text(family, "dark"))
        result = ksampler(model, given, at=at, **{"steps": 2, **settings})
        weights = {weight.device for weight in model.model.diffusion_model.parameters()}
        assert weights == {CPU if held.offloaded else CARD}
    assert result.device == CPU
    return Sampled(steps, counter.rows)


def as_it_is(model):
    return model


@functools.cache
def unguided(family: str, way: str) -> Sampled:
    """By the base alone, where each step is one evaluation as with an adapter."""
    return sampled(family, way, as_it_is, cfg=1.0)


# A sampling


def test_every_kind_is_there():
    for family in FAMILIES:
        kinds = backbone_of(model_on_card(family, WAYS["bf16"]).model).kinds or KINDS
        assert {kind for name, kind in EVERY_KIND if name == family} == {*kinds}


@each_way
@pytest.mark.parametrize(("family", "kind"), EVERY_KIND)
def test_a_step_is_on_one_device_and_waits_for_nothing(family, kind, way):
    found = sampled(family, way, adapted(family, kind))
    assert found.rows[-2:] == [1, 1]
    assert found.steps[-1] == unguided(family, way).steps[-1]


@pytest.mark.parametrize("family", [XL, "sd3"])
def test_low_rank_changes_are_in_the_weights_or_hooks(family):
    merged = sampled(family, "bf16", adapted(family, "low_rank"))
    assert len(merged.steps) == 3  # the first one is not over when the sampling starts again with them
    hooked = sampled(family, "bf16", adapted(family, "low_rank", modulated=True))
    assert len(hooked.steps) == 2
    assert merged.steps[-1] == hooked.steps[-1] == unguided(family, "bf16").steps[-1]


@pytest.mark.parametrize(
    ("family", "first"),
    [
        (XL, {"unet.py": 1}),  # the negative's tokens
        # Noise and its level for both prompts, and the mean of the negative's tokens.
        ("sd3", {"transformer.py": 4, "prompt.py": 1}),
        ("wan2.1-t2v", {"transformer.py": 4, "prompt.py": 1}),
    ],
)
def test_prompts_are_brought_to_the_card_once_in_a_sampling(family, first):
    found, alone = sampled(family, "bf16", adapted(family), steps=3), unguided(family, "bf16")
    of_prompts, *later = found.files()[-3:]
    assert of_prompts.items() >= first.items()
    assert later == [alone.files()[-1]] * 2


NEGATIVES = {
    "strengths": ({}, {"strength": 0.5}),
    "masks": ({"mask": torch.ones(1, 8, 8).tril(), "mask_strength": 1.0}, {}),
    "areas": ({"area": (8, 4, 0, 0)}, {}),
    "default": ({"area": (8, 4, 0, 0)}, {"default": True}),
}


@pytest.mark.parametrize(
    ("family", "negatives"), [(XL, "strengths"), (XL, "areas"), ("sd3", "masks"), ("sd3", "default")]
)
def test_several_negatives_are_weighed_on_the_card(family, negatives):
    one, other = NEGATIVES[negatives]
    several = [(text(family, "dark"), one), (text(family, "blurred"), other)]
    negative = [[tokens, {**entries, **more}] for given, more in several for tokens, entries in given]
    found = sampled(family, "bf16", adapted(family), Prompts(text(family, "a fox"), negative))
    assert found.rows[-1] == 1
    assert found.steps[-1] == unguided(family, "bf16").steps[-1]


def half(family: str, kind: str, **settings) -> Apply:
    return adapted(family, kind, GuidanceSettings(strength=0.5), **settings)


@pytest.mark.parametrize("family", [XL, "sd3"])
def test_two_adapters_wait_for_nothing(family):
    found = sampled(family, "bf16", lambda model: half(family, "scale")(half(family, "delta", modulated=True)(model)))
    assert found.rows == [1, 1]
    assert found.steps[-1] == []


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpm_2"])
def test_evaluations_wait_for_nothing_whatever_the_sampler(sampler):
    found = sampled("sd3", "bf16", adapted("sd3"), sampler=sampler, steps=3)
    assert found.steps[-1] == found.steps[-2] == []


def test_what_is_compared_for_a_warning_is_read_before_the_steps():
    """Of an adapter on which the negative prompt has no effect, in the second step."""

    def apply(model):
        info, weights = weights_for(model, XL, "offset")
        return apply_adapter(model, replace(info, negative_mode="ignored"), weights, source="it", notify=notes.append)

    notes: list[str] = []
    found = sampled(XL, "bf16", apply)
    assert "ignores the negative prompt" in notes[0]
    assert found.steps == [[], []]


# What is read at each step, for the host decides by it


@pytest.mark.parametrize(
    "apply",
    [
        adapted(XL, guidance=GuidanceSettings(start_percent=0.2, end_percent=0.9)),
        lambda model: apply_training_free(model, GuidanceSettings(start_percent=0.2), notify=lambda message: None),
    ],
    ids=["adapter", "training-free"],
)
def test_the_part_of_a_sampling_that_is_guided_takes_one_noise_level_per_step(apply):
    """However many ask."""
    found = sampled(XL, "bf16", apply, steps=4)
    levels = [step.pop("schedule.py") for step in found.files()]
    assert levels == [1] * 4


@pytest.mark.parametrize(
    ("family", "apply"),
    [
        (XL, adapted(XL, guidance=GuidanceSettings(forecast=True))),
        ("sd3", functools.partial(apply_training_free, notify=pytest.fail)),
        ("wan2.1-t2v", adapted("wan2.1-t2v", guidance=GuidanceSettings(forecast=True))),
    ],
    ids=[XL, "sd3-training-free", "wan2.1-t2v"],
)
def test_forecasts_take_the_noise_level_and_whether_one_is_good_per_step(family, apply, smooth):
    """The latter where a step could be forecast: two and a third are evaluated first, and two in a row are at most."""
    found, evaluation = sampled(family, "bf16", apply, steps=7), unguided(family, "bf16").files()[-1]
    steps = found.files()[-7:]
    assert [step.pop("schedule.py") for step in steps] == [1] * 7
    assert [step.pop("forecast.py", 0) for step in steps] == [0, 0, 0, 1, 1, 0, 1]
    assert steps[3:] == [{}, {}, evaluation, {}]
    assert len(found.rows) == 4


# Training and what measures it


@dataclass(frozen=True)
class Trained:
    """`waits`: how often a file waited for the card."""

    waits: Counter[str]
    result: Any


def trained(family: str, way: str, kind: str, **settings) -> Trained:
    """One iteration, with activation checkpointing."""
    small = {"iterations": 1, "batch": 2, "pool": 1, "steps_min": 2, "steps_max": 2, "held_out": 0}
    config = replace(of_kind(kind, CONFIG), **{**small, **settings})
    layout = replace(StepLayout.of_config(config, config.batch), checkpointing=True)
    model = model_on_card(family, WAYS[way])
    with card(offloaded=WAYS[way].offloaded, trains=True) as on:
        result = train(ComfyModel(model, Clip(family)), PROMPTS, config, options=RunOptions(plan=layout))
    return Trained(Counter(map(_file_of, on.waits)), result)


@some
def test_training_with_checkpointing_is_on_one_device(family, way):
    found = trained(family, way, "delta")
    assert len(found.result.losses) == 1
    assert {weight.device for weight in found.result.adapter.parameters()} == {CPU}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("delta", "scale")])
def test_other_kinds_are_trained_on_one_device(kind):
    assert len(trained(XL, "offloaded", kind).result.losses) == 1


@some
def test_calibration_is_on_one_device(family, way):
    assert len(trained(family, way, "scale").result.losses) == 1


def test_an_iteration_does_not_wait_for_each_parameter():
    """In fp16 too, where all gradients are looked at."""
    found = trained("sd3", "fp16", "delta", rank=2)
    assert sum(each.numel() > 0 for each in found.result.adapter.parameters()) > 20
    assert found.waits["training_step.py"] < 10


@some
def test_evaluations_are_on_one_device(family, way, monkeypatch):
    """Those while training, and of a finished adapter."""
    monkeypatch.setattr(training.assess, "_WARM_UP", 1)
    loaded, settings = model_on_card(family, WAYS[way]), AssessConfig(omegas=(3.0,), steps=1, count=1)
    info, weights = weights_for(loaded, family, "delta")
    candidate = Candidate(info, weights, "the file")
    with card(offloaded=WAYS[way].offloaded):
        model, sampler = ComfyModel(loaded, Clip(family)), ComfySampler(loaded, info, weights, source="the file")
        found = assess(
            model, sampler, candidate, PromptTexts(["a fox"], ["dark"]), replace(settings, width=64, height=64)
        )
        positive, negative = (model.text_encoder.encode([prompt]) for prompt in ("a fox", "dark"))
        trajectories = Trajectories(model.denoiser.latent_shape(64, 64), [3.0], steps=1)
        with model.denoiser.session():
            states = follow_teacher(model.denoiser, positive, negative, trajectories)
            measured = evaluate(model.denoiser, candidate.adapter().to(CARD), states)
    assert [cost.evaluations_per_step for cost in found.costs.values()] == [1, 2, 1]
    assert [*found.by_omega] == [*measured.gap_closed] == [3.0]


# The card itself


def test_devices_are_not_mixed_and_waits_are_seen():
    values = torch.tensor([0.5, 2.0])
    with card() as on:
        here = values.to(CARD)
        with pytest.raises(RuntimeError, match="two different devices"):
            here + values
        for wait in (lambda: here[1].item(), here.cpu, lambda: bool(here.any()), here.tolist, here.nonzero):
            before = len(on.waits)
            wait()
            assert len(on.waits) > before
        assert float(2 * here[1]) == 4.0
        before = len(on.waits)
        values.to(CARD, non_blocking=True)
        assert (here + here.mean()).device == torch.zeros(2, device=CARD).device == CARD
        assert len(on.waits) == before
    assert mm.current_loaded_models == []

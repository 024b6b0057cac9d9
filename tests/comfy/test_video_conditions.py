"""What nodes for videos put on prompts beside text: guiding frames, references, control videos, a camera's path."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import node_helpers
import pytest
import torch
from comfy_extras.nodes_lt import LTXVAddGuide, get_noise_mask

from comfyui_agd.tests.support import tiny_families
from comfyui_agd.tests.support.family_adapters import adapted
from comfyui_agd.tests.support.runtime import Prompts, ksampler, rows_of
from comfyui_agd.tests.support.tiny_families import (
    TINY_FAMILIES,
    TinyFamily,
    conditioning,
    empty_latent,
    flat,
    tiny_model,
)

STEPS = 2
_WAN, _SIZES = tiny_families._WAN, {"latent": (16, 2, 8, 8), "width": 4096, "assumed": ("num_heads",)}
# Models of a family of their own only by what they are given.
VARIANTS = {
    "wan-vace": TinyFamily(
        "WAN21_Vace", "wan.model.VaceWanModel", {**_WAN, "vace_layers": 2, "vace_in_dim": 96}, **_SIZES
    ),
    "wan-fun": TinyFamily(
        "WAN21_FunControl2V",
        "wan.model.WanModel",
        {**_WAN, "model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        extras=tiny_families._image_of_wan,
        **_SIZES,
    ),
    "wan-camera": TinyFamily(
        "WAN22_Camera",
        "wan.model.CameraWanModel",
        {**_WAN, "model_type": "camera_2.2", "in_dim": 36, "in_dim_control_adapter": 24},
        **_SIZES,
    ),
}


@dataclass(frozen=True)
class Case:
    """A workflow. `add`: (prompts, LATENT) -> those with what it adds."""

    family: str
    add: Callable[[Prompts, dict], tuple[Prompts, dict]]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def on_both(**entries) -> Callable:
    """As most nodes do: the same on both prompts."""

    def add(given: Prompts, at: dict) -> tuple[Prompts, dict]:
        both = (node_helpers.conditioning_set_values(each, entries) for each in (given.positive, given.negative))
        return Prompts(*both), at

    return add


def on_the_positive(**entries) -> Callable:
    def add(given: Prompts, at: dict) -> tuple[Prompts, dict]:
        return Prompts(node_helpers.conditioning_set_values(given.positive, entries), given.negative), at

    return add


def guided_by_a_frame(attention: float) -> Callable:
    """LTXVAddGuide; `attention`: how much the video looks at it, which at 1 takes one attention and else several."""

    def add(given: Prompts, at: dict) -> tuple[Prompts, dict]:
        samples, frame = at["samples"], drawn(1, 128, 1, 4, 4)
        positive, negative, samples, mask = LTXVAddGuide.append_keyframe(
            given.positive, given.negative, 0, samples, get_noise_mask(at), frame, 1.0, (8, 32, 32)
        )
        entry = {"pre_filter_count": 16, "strength": attention, "pixel_mask": None, "latent_shape": [1, 4, 4]}
        given, _ = on_both(guide_attention_entries=[entry])(Prompts(positive, negative), at)
        return given, {"samples": samples, "noise_mask": mask}

    return add


CASES = {
    "LTXVAddGuide": Case("ltxv", guided_by_a_frame(1.0)),
    "LTXVAddGuide, half as strong": Case("ltxv", guided_by_a_frame(0.5)),
    "WanPhantomSubjectToVideo": Case("wan2.1-t2v", on_both(time_dim_concat=drawn(1, 16, 3, 8, 8))),
    "Kandinsky5ImageToVideo": Case("kandinsky5", on_both(time_dim_replace=drawn(1, 16, 1, 8, 8))),
    "WanVaceToVideo": Case("wan-vace", on_both(vace_frames=[drawn(1, 32, 2, 8, 8)], vace_mask=[drawn(1, 64, 2, 8, 8)])),
    "Wan22FunControlToVideo": Case("wan-fun", on_both(reference_latents=[drawn(1, 16, 1, 8, 8)])),
    "WanCameraImageToVideo": Case("wan-camera", on_both(camera_conditions=drawn(1, 24, 2, 64, 64))),
    "HunyuanImageToVideo": Case("hunyuan-video", on_the_positive(ref_latent=drawn(1, 16, 1, 8, 8))),
}


@pytest.fixture(scope="module", autouse=True)
def _variants() -> Iterator[None]:
    with mock.patch.dict(TINY_FAMILIES, VARIANTS):
        yield


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def base(case):
    return tiny_model(case.family)


def sample(case: Case, model, negative: str = "blurry", **options) -> torch.Tensor:
    given = Prompts(*(conditioning(case.family, text) for text in ("a fox", negative)))
    given, at = case.add(given, empty_latent(case.family))
    return flat(ksampler(model, given, at=at, **{"steps": STEPS, **options}))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_an_adapter_guides_in_one_evaluation_per_step_and_the_negative_prompt_matters(case, base):
    plain, model = sample(case, base, cfg=1.0), adapted(case.family, base)
    guided = sample(case, model)
    assert guided.isfinite().all()
    assert rows_of(model, lambda model: sample(case, model))[-STEPS:] == [1] * STEPS
    assert apart(guided, plain) > 0.03
    assert apart(guided, sample(case, model, negative="dark and ugly")) > 1e-3
    assert torch.equal(sample(case, model, cfg=1.0), plain)
    assert torch.equal(sample(case, base, cfg=1.0), plain)  # bypassed: nothing stays behind


def test_equal_prompts_have_no_difference(case, base):
    """Whatever is beside their text: what is added for one is not what guidance leads away from."""
    plain, guided = (
        sample(case, model, "a fox", cfg=cfg)
        for model, cfg in ((base, 1.0), (adapted(case.family, base, "scale"), 5.0))
    )
    assert apart(guided, plain) < 1e-5

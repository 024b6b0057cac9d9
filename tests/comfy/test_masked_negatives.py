"""Negative prompts for parts of a picture or a video, on every transformer family: each counts in its part."""

import nodes
import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel

from comfyui_agd.agd_core.comfyui.fused_attention import FUSED_ATTENTION
from comfyui_agd.agd_core.comfyui.prompt import Prompt
from comfyui_agd.agd_core.comfyui.sampling import messages
from comfyui_agd.agd_core.comfyui.sampling.negatives import WeightedNegative
from comfyui_agd.tests.support.family_adapters import adapted
from comfyui_agd.tests.support.runtime import Prompts, ksampler
from comfyui_agd.tests.support.tiny_families import TINY_FAMILIES, conditioning, empty_latent, tiny_model

LEFT, RIGHT = slice(0, 4), slice(4, 8)
ONE, OTHER = "blurry", "dark, ugly and bad"
# ComfyUI itself has no masks for several latents in one.
each_family = pytest.mark.parametrize("name", [name for name in TINY_FAMILIES if name != "ltx-2"])


def in_half(name: str, text: str, left: bool) -> list:
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = float(left)
    mask[..., 32:] = float(not left)
    return nodes.ConditioningSetMask().append(conditioning(name, text), mask, "default", 1.0)[0]


def halves(name: str) -> list:
    return in_half(name, ONE, left=True) + in_half(name, OTHER, left=False)


def sample(name: str, model, negative: list, at: dict | None = None, positive: list | None = None, steps: int = 1):
    given = Prompts(positive or conditioning(name, "a fox"), negative)
    return ksampler(model, given, at=at or empty_latent(name), steps=steps)


@each_family
def test_each_counts_somewhere_and_nothing_is_said(name):
    said: list[str] = []
    model = adapted(name, tiny_model(name), notify=said.append)
    mirrored = in_half(name, OTHER, left=True) + in_half(name, ONE, left=False)
    both, mirrored = (sample(name, model, each, steps=2) for each in (halves(name), mirrored))
    assert said == []
    assert (both - mirrored).norm() > 1e-3 * both.norm()


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("name", ["wan2.1-t2v", "hunyuan-video"])
def test_in_every_frame_of_a_video_each_half_is_led_away_from_its_own(name, frames):
    model, at = adapted(name, tiny_model(name)), {"samples": torch.zeros(1, 16, frames, 8, 8)}
    one, other = (sample(name, model, conditioning(name, text), at) for text in (ONE, OTHER))
    both = sample(name, model, halves(name), at)
    for half, own, rest in ((LEFT, one, other), (RIGHT, other, one)):
        away = ((both - each)[..., half].square().sum(dim=(0, 1, 3, 4)) for each in (own, rest))
        assert (next(away) < 0.5 * next(away)).all()


@pytest.mark.parametrize(("name", "more"), [("qwen-image", 3), ("omnigen2", 1)])
def test_beside_pictures_to_edit_each_counts_everywhere_which_is_said_once(name, more):
    """Three of them are as many tokens as a picture of twice the height and width."""
    said: list[str] = []
    model = adapted(name, tiny_model(name), notify=said.append)
    pictures = [torch.randn(1, *TINY_FAMILIES[name].latent, generator=torch.Generator().manual_seed(0))] * more
    negatives, positive = halves(name), conditioning(name, "a fox")
    for _, entries in (*negatives, *positive):
        entries["reference_latents"] = pictures
    found = sample(name, model, negatives, positive=positive, steps=2)
    assert found.isfinite().all()
    assert said == [messages.NEGATIVES_UNPLACED]


def test_where_they_begin_later_it_is_said_then():
    said: list[str] = []
    model = adapted("omnigen2", tiny_model("omnigen2"), notify=said.append)
    positive = conditioning("omnigen2", "a fox")
    positive[0][1]["reference_latents"] = [torch.ones(1, 16, 8, 8)]
    in_range = nodes.ConditioningSetTimestepRange().set_range
    everywhere = in_range(conditioning("omnigen2", ONE), 0.0, 0.5)[0]
    sample("omnigen2", model, everywhere + in_range(halves("omnigen2"), 0.5, 1.0)[0], positive=positive, steps=4)
    assert said == [messages.NEGATIVES_UNPLACED]


def test_of_latents_that_another_node_has_cut_into_tiles_it_is_seen():
    negative = WeightedNegative(Prompt({}), torch.ones(1, 1, 8, 8))
    (weight,) = negative.cropped([None], torch.Size((1, 4, 4, 4))).weight.unique()
    assert (float(weight), bool(negative.unplaced)) == (1.0, True)


@pytest.mark.parametrize(("name", "unplaced"), [("wan2.1-t2v", False), ("qwen-image", True)])
def test_compiled_it_is_the_same(name, unplaced):
    base = tiny_model(name)
    base.model_options["transformer_options"].update(FUSED_ATTENTION)
    compiled, positive = TorchCompileModel.execute(base, "eager").args[0], conditioning(name, "a fox")
    if unplaced:
        positive[0][1]["reference_latents"] = [torch.ones(1, 16, 1, 8, 8)]
    found, said = [], []
    for model in (base, compiled):
        model = adapted(name, model, notify=said.append)
        found.append(sample(name, model, halves(name), positive=positive, steps=2))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert said == [messages.NEGATIVES_UNPLACED] * 2 * unplaced

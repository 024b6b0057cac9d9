"""Workflows without a negative prompt, on every transformer family: guidance leads away from the unconditional that the
adapter was trained with.
"""

import nodes
import pytest
import torch

from comfyui_agd.agd_core.comfyui.prompt import with_tokens
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.comfyui.sampling.settings import GuidanceSettings
from comfyui_agd.tests.support import runtime
from comfyui_agd.tests.support.family_adapters import adapter_of
from comfyui_agd.tests.support.runtime import CFG, Prompts, custom_sampler, ksampler
from comfyui_agd.tests.support.tiny_families import TINY_FAMILIES, conditioning, empty_latent, flat, tiny_model

STEPS = 2
# Of tokens that come to the model as they go to its network.
UNMAPPED = ("t5xxl_ids", "t5xxl_weights")


@pytest.fixture(params=TINY_FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture
def unconditional(name) -> torch.Tensor:
    """[tokens, width], fewer than the prompt has where its length is free."""
    shape = adapter_of(name)[1]["unconditional"].shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(name, unconditional):
    info, weights = adapter_of(name)
    settings = GuidanceSettings(guidance_scale=CFG)
    weights = {**weights, "unconditional": unconditional}
    return apply_adapter(tiny_model(name), info, weights, settings, source="the file", notify=pytest.fail)


def named(unconditional: torch.Tensor, positive: list) -> list:
    """The same as a negative prompt: what else there is, is the positive's."""
    ((_, entries),) = positive
    own = {key: value for key, value in entries.items() if key not in UNMAPPED}
    if "attention_mask" in own:
        own["attention_mask"] = torch.ones(1, len(unconditional), dtype=torch.long)
    return [[unconditional[None], own]]


@pytest.fixture
def found(name, model, monkeypatch) -> torch.Tensor:
    """Sampled without a negative prompt."""
    monkeypatch.setattr(runtime, "STEPS", STEPS)
    return flat(
        custom_sampler(model, Prompts(conditioning(name, "a very brown fox"), []), "BasicGuider", at=empty_latent(name))
    )


def test_it_is_as_if_the_trained_unconditional_were_the_negative(name, model, unconditional, found):
    positive = conditioning(name, "a very brown fox")
    if name == "flux2":  # ComfyUI puts zeros before so short a negative prompt; its text encoder makes none
        assert found.isfinite().all()
        return
    given = Prompts(positive, named(unconditional, positive))
    expected = flat(custom_sampler(model, given, "CFGGuider", at=empty_latent(name)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_negative_of_zeros_is_none(name, model, found):
    if name == "anima":
        pytest.skip("ComfyUI maps the zeros together with the ids of the text")
    zeros = nodes.ConditioningZeroOut().zero_out(conditioning(name, "blurry"))[0]
    zeroed = flat(
        ksampler(model, Prompts(conditioning(name, "a very brown fox"), zeros), at=empty_latent(name), steps=STEPS)
    )
    torch.testing.assert_close(zeroed, found, rtol=1e-3, atol=1e-3)


def test_masks_of_something_else_are_left_out():
    """Flux Redux's is of the image's tokens and the prompt's."""
    given = {"c_crossattn": torch.zeros(1, 5, 4), "attention_mask": torch.zeros(1, 21, 21), "y": torch.ones(1, 3)}
    found = with_tokens(given, torch.ones(1, 2, 4))
    assert sorted(found) == ["c_crossattn", "y"]


def test_of_other_tokens_all_count():
    given = {"c_crossattn": torch.zeros(1, 5, 4), "attention_mask": torch.zeros(1, 5), "num_tokens": 3}
    found = with_tokens(given, torch.ones(1, 2, 4))
    assert (found["attention_mask"].tolist(), found["num_tokens"]) == ([[1, 1]], 2)

"""Which negative prompts an adapter is trained with."""

from dataclasses import replace
from pathlib import Path

import pytest

from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel, of_kind
from comfyui_agd.training.job import Job
from comfyui_agd.training.prompts import fragments

LONG = ["a photo of an owl, soft light, in the snow", "two lions"]


def negatives(negative=(), model=None, prompts=LONG, **config) -> list[str]:
    chosen = replace(of_kind(config.get("kind", CONFIG.kind)), **config)
    return Job(model or AnalyticModel(), prompts, chosen, Path("a.safetensors"), negative).negatives


class FewWords(AnalyticModel):
    """As the toy: unknown words are an error."""

    def length(self, prompt):
        if "lions" not in prompt and "owl" not in prompt and prompt:
            raise ValueError("I don't know these words.")
        return super().length(prompt)


@pytest.mark.parametrize("kind", ["delta", "scale"])
def test_half_of_what_a_kind_that_uses_them_learns_from_is_empty(kind):
    found = negatives(kind=kind)
    assert sum(not text for text in found) == len(found) / 2
    assert found[0] == ""


@pytest.mark.parametrize("kind", ["delta", "scale"])
def test_given_ones_are_the_other_half(kind):
    assert negatives(["blurry", "text"], kind=kind) == ["", "", "blurry", "text"]


def test_only_empty_ones_if_that_is_what_is_given():
    assert negatives([""], kind="delta") == [""]


@pytest.mark.parametrize("kind", ["cross_attention", "offset", "low_rank"])
def test_a_kind_that_uses_none_learns_from_exactly_those_given(kind):
    assert negatives(kind=kind) == [""]
    assert negatives(["blurry"], kind=kind) == ["blurry"]


def test_with_a_recording_they_are_the_recorded_ones_whichever_kind_is_trained():
    job = Job(AnalyticModel(), LONG, CONFIG, Path("a.safetensors"), ["blurry", "", "text"], recording=object())
    assert job.negatives == ["blurry", "", "text"]


def test_the_built_in_ones_are_left_out_where_the_text_encoder_does_not_know_their_words():
    few, all_words = set(negatives(model=FewWords())), set(negatives())
    assert few < all_words
    assert all(any(text in prompt for prompt in LONG) for text in few)


def test_they_are_the_same_for_the_same_seed():
    assert negatives(prompts=PROMPTS) == negatives(prompts=PROMPTS)
    assert negatives(prompts=PROMPTS) != negatives(prompts=PROMPTS, seed=1)


def test_fragments_are_parts_between_commas_and_up_to_four_words_of_them():
    found = fragments(LONG, 200, seed=0)
    assert len(found) == 200
    assert {"a photo of an owl", "soft light", "two lions"} <= set(found)
    parts = [part.strip() for prompt in LONG for part in prompt.split(",")]
    for text in found:
        assert any(text in part for part in parts)
        assert text in parts or len(text.split()) <= 4


def test_no_prompts_no_fragments():
    assert fragments(["", " , "], 5, seed=0) == []

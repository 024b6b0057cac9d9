"""Every transformer family that people run with CFG, as a tiny model in its true layout: what its row says is so."""

import pytest
import torch

from comfyui_agd.tests.support.runtime import STEPS, Prompts, ksampler, rows_of
from comfyui_agd.tests.support.tiny_families import TINY_FAMILIES, conditioning, empty_latent, flat, tiny_model

each_family = pytest.mark.parametrize("name", TINY_FAMILIES)


def prompts(name: str, positive: str = "a fox", negative: str = "blurry, dark") -> Prompts:
    return Prompts(conditioning(name, positive), conditioning(name, negative))


def sample(name: str, model, given: Prompts, **options) -> torch.Tensor:
    return flat(ksampler(model, given, at=empty_latent(name), **options))


@each_family
def test_comfyui_detects_it_and_loads_all_its_weights(name, caplog):
    model = tiny_model(name).model
    assert type(model.model_config).__name__ == TINY_FAMILIES[name].family
    assert not [record for record in caplog.records if "unet missing" in record.msg or "unet unexpected" in record.msg]


@each_family
def test_it_samples_with_guidance_and_both_prompts_matter(name):
    model = tiny_model(name)
    guided = sample(name, model, prompts(name))
    assert guided.isfinite().all()
    for other in (prompts(name, positive="a cat"), prompts(name, negative="")):
        assert (sample(name, model, other) - guided).norm() > 0.1 * guided.norm()
    assert torch.equal(sample(name, tiny_model(name), prompts(name)), guided)


@each_family
@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_costs_it_two_rows_a_step_and_picture(name, batch):
    rows = rows_of(tiny_model(name), ksampler, prompts(name), at=empty_latent(name, batch))
    assert sum(rows) == 2 * batch * STEPS

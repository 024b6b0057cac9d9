"""Sampling with an adapter whose steps are forecast where they can be: counts, pictures, and who else is there."""

import nodes
import pytest
import torch
from comfy_extras.nodes_easycache import EasyCacheNode

from comfyui_agd.tests.support.runtime import Prompts, ksampler, latent, patched, rows_of
from comfyui_agd.tests.support.workflows import NODES

MANY = {"steps": 20}


@pytest.fixture(scope="module")
def file(base, save_adapter):
    return save_adapter(base)


@pytest.fixture(scope="module")
def merged(base, save_adapter):
    return save_adapter(base, kind="low_rank")


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim", "uni_pc"])
@pytest.mark.parametrize("kind", ["file", "merged"])
def test_fewer_steps_are_evaluated_for_nearly_the_same_picture(base, prompts, request, kind, sampler):
    file, how = request.getfixturevalue(kind), {"sampler": sampler, **MANY}
    all_of_them = ksampler(patched(base, file), prompts, **how)
    model = patched(base, file, forecast=True)
    assert 7 <= len(rows_of(model, ksampler, prompts, **how)) <= 15
    assert distance(ksampler(model, prompts, **how), all_of_them) < 0.05
    assert torch.equal(ksampler(patched(base, file, forecast=False), prompts, **how), all_of_them)


def test_the_first_steps_are_evaluated(base, prompts, file):
    few = {"steps": 3}
    expected = ksampler(patched(base, file), prompts, **few)
    assert torch.equal(ksampler(patched(base, file, forecast=True), prompts, **few), expected)


def test_each_sampling_begins_anew(base, prompts, file):
    model = patched(base, file, forecast=True)
    first = ksampler(model, prompts, **MANY)
    ksampler(model, prompts, cfg=9.0, at=latent(2), **MANY)
    assert torch.equal(ksampler(model, prompts, **MANY), first)


def test_a_sampler_that_asks_twice_at_a_level_gets_an_evaluation_the_second_time(base, prompts, file):
    every = len(rows_of(patched(base, file), ksampler, prompts, sampler="heun", **MANY))
    some = len(rows_of(patched(base, file, forecast=True), ksampler, prompts, sampler="heun", **MANY))
    assert every / 2 < some < every


def test_at_cfg_1_and_at_strength_0_nothing_is_forecast(base, prompts, file):
    expected = ksampler(base, prompts, cfg=1.0, **MANY)
    assert torch.equal(ksampler(patched(base, file, forecast=True), prompts, cfg=1.0, **MANY), expected)
    model = patched(base, file, forecast=True, strength=0.0)
    assert torch.equal(ksampler(model, prompts, **MANY), ksampler(base, prompts, **MANY))


def test_steps_outside_the_range_are_the_bases_own(base, prompts, file):
    rows = rows_of(patched(base, file, forecast=True, start_percent=0.5), ksampler, prompts, **MANY)
    assert rows.count(2) == rows_of(patched(base, file, start_percent=0.5), ksampler, prompts, **MANY).count(2)
    assert len(rows) < 20


@pytest.mark.parametrize("name", ["PAG", "SelfAttentionGuidance"])
def test_what_another_node_evaluates_is_never_compared_with_a_forecast(base, prompts, file, name):
    expected = ksampler(NODES[name](patched(base, file)), prompts, **MANY)
    assert torch.equal(ksampler(NODES[name](patched(base, file, forecast=True)), prompts, **MANY), expected)


@pytest.mark.parametrize("kind", ["file", "merged"])
def test_beside_a_step_cache_nothing_is_forecast_and_it_is_said(base, prompts, request, kind):
    file, messages = request.getfixturevalue(kind), []

    def cached(**options):
        model = patched(base, file, **options)
        return ksampler(EasyCacheNode.execute(model, 2.0, 0.15, 0.95, False).args[0], prompts, **MANY)

    assert torch.equal(cached(forecast=True, notify=messages.append), cached())
    said = [message for message in messages if message.startswith("Nothing is forecast: ")]
    assert len(said) == 1


def test_prompts_for_a_part_of_the_sampling_are_no_step_cache(base, prompts, file):
    positive = nodes.ConditioningSetTimestepRange().set_range(prompts.positive, 0.0, 0.5)[0]
    messages = []
    model = patched(base, file, forecast=True, notify=messages.append)
    ksampler(model, Prompts(positive, prompts.negative), **MANY)
    assert not any(message.startswith("Nothing is forecast: ") for message in messages)


def evaluated_at(model, prompts) -> list[float]:
    """The timesteps that a sampling evaluates."""
    model, found = model.clone(), []

    def note(executor, x, timestep, *args, **kwargs):
        found.append(timestep[0].item())
        return executor(x, timestep, *args, **kwargs)

    model.add_wrapper_with_key("diffusion_model", "test", note)
    ksampler(model, prompts, **MANY)
    return found


def test_with_another_cfg_nothing_is_forecast_from_the_steps_before(base, prompts, file):
    change, sampling = NODES["CFGOverride"], base.get_model_object("model_sampling")
    steps = evaluated_at(change(patched(base, file)), prompts)
    half = sampling.timestep(torch.tensor(sampling.percent_to_sigma(0.5))).item()
    first = next(i for i, step in enumerate(steps) if step < half)
    evaluated = evaluated_at(change(patched(base, file, forecast=True)), prompts)
    assert set(steps[first : first + 3]) <= set(evaluated)
    assert len(set(evaluated)) < len(steps)

"""ControlNets on transformers beside an adapter and training-free, on tiny models in their true layout."""

import pytest
import torch

from comfyui_agd.tests.support.family_adapters import adapted
from comfyui_agd.tests.support.runtime import STEPS, Prompts, ksampler, rows_of, training_free
from comfyui_agd.tests.support.tiny_controls import (
    CONTROL_PATCHES,
    TINY_CONTROLS,
    controlled,
    tiny_control,
    with_control_patch,
)
from comfyui_agd.tests.support.tiny_families import conditioning, empty_latent, flat, tiny_model

each_control = pytest.mark.parametrize("name", TINY_CONTROLS)

pytestmark = pytest.mark.usefixtures("no_dead_models")


def prompts(name: str, negative: str = "blurry, dark") -> Prompts:
    family = TINY_CONTROLS[name].family
    return Prompts(conditioning(family, "a fox"), conditioning(family, negative))


def sample(name: str, model, given: Prompts, batch: int = 1, **options) -> torch.Tensor:
    return flat(ksampler(model, given, at=empty_latent(TINY_CONTROLS[name].family, batch), **options))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture
def base(name):
    return tiny_model(TINY_CONTROLS[name].family)


@pytest.fixture
def model(name, base):
    return adapted(TINY_CONTROLS[name].family, base)


@each_control
def test_comfyui_loads_all_its_weights_and_it_is_seen(name, base, caplog):
    given = prompts(name)
    plain = sample(name, base, given)
    assert apart(sample(name, base, controlled(name, given)), plain) > 0.02
    assert not [record for record in caplog.records if "missing controlnet" in record.msg]


@each_control
def test_with_nothing_to_do_the_picture_is_the_bases_with_it_to_the_bit(name, base):
    family = TINY_CONTROLS[name].family
    plain, guided = (sample(name, base, controlled(name, prompts(name)), cfg=cfg) for cfg in (1.0, 5.0))
    assert torch.equal(sample(name, adapted(family, base), controlled(name, prompts(name)), cfg=1.0), plain)
    assert torch.equal(sample(name, adapted(family, base, strength=0.0), controlled(name, prompts(name))), guided)
    assert torch.equal(sample(name, base, controlled(name, prompts(name))), guided)  # bypassed


@each_control
def test_it_is_seen_beside_the_adapter_at_one_evaluation_per_step_of_both(name, model):
    given, control, rows = prompts(name), tiny_control(name), []
    control.control_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["x"])), with_kwargs=True
    )
    with_control = controlled(name, given, control=control)
    at = empty_latent(TINY_CONTROLS[name].family)
    assert rows_of(model, ksampler, with_control, at=at)[-STEPS:] == [1] * STEPS
    assert rows == [1] * STEPS
    guided = sample(name, model, with_control)
    assert guided.isfinite().all()
    assert apart(guided, sample(name, model, given)) > 0.02
    assert apart(guided, sample(name, model, controlled(name, prompts(name, negative="")))) > 1e-3
    assert apart(sample(name, model, controlled(name, given, strength=0.0)), sample(name, model, given)) < 1e-5


@each_control
def test_equal_prompts_have_no_difference_beside_it(name, base):
    same = prompts(name, negative="a fox")
    scaled = adapted(TINY_CONTROLS[name].family, base, "scale")
    found, expected = sample(name, scaled, controlled(name, same)), sample(name, base, controlled(name, same), cfg=1.0)
    assert apart(found, expected) < 1e-5


@each_control
def test_a_picture_of_a_batch_is_that_alone(name, model):
    alone, both = (sample(name, model, controlled(name, prompts(name)), batch=batch) for batch in (1, 2))
    assert apart(both[:1], alone) < 1e-4


@each_control
def test_on_the_positive_alone_it_is_the_same_as_on_both(name, model):
    given = prompts(name)
    both = controlled(name, given)
    assert torch.equal(sample(name, model, Prompts(both.positive, given.negative)), sample(name, model, both))


@each_control
def test_training_free_it_is_evaluated_once_per_step_too(name, base, smooth):
    given, steps = prompts(name), 12
    at, model = empty_latent(TINY_CONTROLS[name].family), training_free(base, notify=lambda message: None)
    rows = rows_of(model, ksampler, controlled(name, given), at=at, steps=steps)
    assert sum(rows) <= 1.5 * steps
    guided = sample(name, model, controlled(name, given), steps=steps)
    assert guided.isfinite().all()
    assert apart(guided, sample(name, model, given, steps=steps)) > 0.02
    assert torch.equal(
        sample(name, model, controlled(name, given), cfg=1.0), sample(name, base, controlled(name, given), cfg=1.0)
    )


# ControlNets that nodes put into the model.


def patched_sample(family: str, model, negative: str = "blurry, dark", **options) -> torch.Tensor:
    given = Prompts(conditioning(family, "a fox"), conditioning(family, negative))
    return flat(ksampler(model, given, at=empty_latent(family), **options))


@pytest.mark.parametrize("family", CONTROL_PATCHES)
def test_in_the_model_it_is_seen_before_and_behind_the_loader_alike(family):
    base = tiny_model(family)
    model = adapted(family, with_control_patch(family, base))
    guided = patched_sample(family, model)
    assert torch.equal(patched_sample(family, with_control_patch(family, adapted(family, base))), guided)
    assert apart(guided, patched_sample(family, adapted(family, base))) > 0.02
    assert apart(guided, patched_sample(family, model, negative="")) > 1e-3
    assert rows_of(model, lambda model: patched_sample(family, model))[-STEPS:] == [1] * STEPS


@pytest.mark.parametrize("family", CONTROL_PATCHES)
def test_in_the_model_with_nothing_to_do_the_picture_is_the_bases_to_the_bit(family):
    base = with_control_patch(family, tiny_model(family))
    plain, guided = patched_sample(family, base, cfg=1.0), patched_sample(family, base)
    assert torch.equal(patched_sample(family, adapted(family, base), cfg=1.0), plain)
    assert torch.equal(patched_sample(family, adapted(family, base, strength=0.0)), guided)


@pytest.mark.parametrize("family", CONTROL_PATCHES)
def test_equal_prompts_have_no_difference_beside_one_in_the_model(family):
    base = with_control_patch(family, tiny_model(family))
    found = patched_sample(family, adapted(family, base, "scale"), negative="a fox")
    assert apart(found, patched_sample(family, base, cfg=1.0)) < 1e-5


@pytest.mark.parametrize("family", CONTROL_PATCHES)
def test_in_the_model_it_is_seen_training_free(family, smooth):
    base, steps = tiny_model(family), 12
    model = training_free(with_control_patch(family, base), notify=lambda message: None)
    assert sum(rows_of(model, lambda model: patched_sample(family, model, steps=steps))) <= 1.5 * steps
    plain = patched_sample(family, training_free(base, notify=lambda message: None), steps=steps)
    assert apart(patched_sample(family, model, steps=steps), plain) > 0.02

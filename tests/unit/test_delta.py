"""What must hold of the kinds that work on delta, and so use the negative prompt: `scale` and `delta`."""

import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.kinds.scale import KNOTS, LAST_TIMESTEP, START
from comfyui_agd.tests.support.small import config_for, randomised, small_layers

KINDS = pytest.mark.parametrize("kind", ["scale", "delta"])


def build(kind: str, **settings) -> Adapter:
    torch.manual_seed(0)
    return Adapter(config_for(small_layers(), kind, hidden=8, encoder_width=8, **settings))


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def guide(adapter: Adapter, omega: float = 4.0, t: float = 500.0, *, name="input_1_0", delta=None, h=None, **more):
    """What is added at a layer of width 24 to an attention of zeros; two rows."""
    width = {"input_1_0": 24, "middle_0_0": 32}[name]
    delta = some(1, 2, 9, width) if delta is None else delta
    h = some(2, 2, 9, width) if h is None else h
    context = torch.zeros(2, 5, 16)
    prepared = adapter.prepare(torch.tensor([omega]), torch.full((2,), t), context, dtype=torch.float32, **more)
    return adapter.add_inside_attention(name, torch.zeros_like(delta), delta, h, prepared)


def trained(kind: str) -> Adapter:
    """An adapter in which everything does something."""
    adapter = build(kind)
    with torch.no_grad():
        for index, parameter in enumerate(adapter.parameters()):
            parameter.add_(0.1 * some(index, *parameter.shape))
    return adapter


@KINDS
@pytest.mark.parametrize("t", [0.0, 333.0, 999.0])
def test_a_new_adapter_guides_with_constants(kind, t):
    delta = some(1, 2, 9, 24)
    torch.testing.assert_close(guide(build(kind), 4.0, t), (4.0 - 1) * START * delta)


@KINDS
def test_a_new_adapter_leaves_the_middle_of_the_unet_alone(kind):
    assert torch.count_nonzero(guide(build(kind), name="middle_0_0")) == 0


@KINDS
def test_omega_1_adds_exactly_nothing(kind):
    assert torch.count_nonzero(guide(trained(kind), omega=1.0)) == 0


@KINDS
def test_every_parameter_is_trained(kind):
    adapter = trained(kind)
    for name in ("input_1_0", "middle_0_0"):
        for t in (0.0, 400.0, 700.0, 999.0):
            guide(adapter, t=t, name=name).square().sum().backward()
    still = [name for name, p in adapter.trained() if p.grad is None or torch.count_nonzero(p.grad) == 0]
    assert still == []


@KINDS
def test_strength_scales_the_residual(kind):
    adapter = trained(kind)
    torch.testing.assert_close(guide(adapter, strength=0.5), 0.5 * guide(adapter))


@KINDS
def test_rows_do_not_see_each_other(kind):
    adapter, delta, h = trained(kind), some(1, 2, 9, 24), some(2, 2, 9, 24)
    together = guide(adapter, delta=delta, h=h)
    other = guide(adapter, delta=delta * torch.tensor([1.0, 2.0])[:, None, None], h=h)
    torch.testing.assert_close(together[0], other[0])
    assert not torch.allclose(together[1], other[1])


@KINDS
def test_where_both_prompts_attend_alike_scale_adds_nothing(kind):
    added = guide(trained(kind), delta=torch.zeros(2, 9, 24))
    assert (torch.count_nonzero(added) == 0) == (kind == "scale")


def test_omega_and_time_matter_to_delta_beyond_the_gain():
    adapter = trained("delta")
    per_gain = [guide(adapter, omega, t) / (omega - 1) for omega, t in ((2.0, 500.0), (8.0, 500.0), (2.0, 50.0))]
    assert not torch.allclose(per_gain[0], per_gain[1])
    assert not torch.allclose(per_gain[0], per_gain[2])


def test_the_scale_is_linear_between_its_knots():
    adapter = trained("scale")
    knots = [LAST_TIMESTEP * i / (KNOTS - 1) for i in range(KNOTS)]
    at = [guide(adapter, t=t) for t in knots]
    for first, second, low, high in zip(at, at[1:], knots, knots[1:], strict=False):
        torch.testing.assert_close(guide(adapter, t=0.75 * low + 0.25 * high), 0.75 * first + 0.25 * second)
    weight = adapter.kind.to_scale.weight[:24]  # the first layer's
    torch.testing.assert_close(at[0], 3 * weight[:, 0] * some(1, 2, 9, 24))


def test_scale_has_no_encoder():
    assert dict(build("scale").named_parameters()).keys() == {"kind.to_scale.weight"}


def test_last_layers_of_delta_start_at_zero():
    assert not any(layer.weight.any() for layer in build("delta").zero_initialised())
    assert all(layer.weight.any() for layer in randomised(build("delta")).zero_initialised())


def test_a_rank_beside_it_starts_at_nothing_and_is_trained():
    new = build("delta", rank=4)
    prepared = new.prepare(torch.tensor([4.0]), torch.tensor([500.0]), torch.zeros(1, 5, 16), dtype=torch.float32)
    x, zeros = some(1, 1, 9, 24), torch.zeros(1, 9, 24)
    assert torch.equal(new.add_at_linear("input_1_0", "attn1.to_q", zeros, x, prepared), zeros)
    assert new.parameter_count() > build("delta").parameter_count()
    assert (
        len(list(new.zero_initialised())) == 2 + 2 * 8
    )  # of both: their maps, and their layers but for keys and values
    with torch.no_grad():
        new.kind.low_rank.to_out["input_1_0_attn1_to_q"].weight.fill_(1.0)
    assert new.add_at_linear("input_1_0", "attn1.to_q", zeros, x, prepared).abs().min() > 0


def test_a_rank_beside_it_without_modulation_is_a_lora():
    adapter, x, zeros = build("delta", rank=4, modulated=False), some(1, 1, 9, 24), torch.zeros(1, 9, 24)
    low_rank = adapter.kind.low_rank
    key = "input_1_0_attn1_to_q"
    torch.nn.init.ones_(low_rank.to_out[key].weight)
    expected = 3.0 * x @ low_rank.down[key].weight.T @ low_rank.to_out[key].weight.T
    for t in (100.0, 900.0):
        prepared = adapter.prepare(torch.tensor([4.0]), torch.tensor([t]), torch.zeros(1, 5, 16), dtype=torch.float32)
        torch.testing.assert_close(adapter.add_at_linear("input_1_0", "attn1.to_q", zeros, x, prepared), expected)

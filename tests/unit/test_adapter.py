"""What must hold of the adapters, whatever their switches."""

import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.config import AdapterConfig
from comfyui_agd.agd_core.kinds import kind_config
from comfyui_agd.agd_core.kinds.low_rank import key_of
from comfyui_agd.tests.support.small import TIME_CHANNELS, config_for, randomised, small_layer, small_layers

OURS = {"kind": "cross_attention"}
PLAIN = {"kind": "cross_attention", "gain": False, "omega_embedding": "fourier", "shared_encoder": False}
OFFSET = {"kind": "offset"}
PLAIN_OFFSET = {**PLAIN, "kind": "offset"}
LOW_RANK = {"kind": "low_rank", "modulated": True}
LORA = {"kind": "low_rank"}
AUTHORS = [{"kind": "paper_attention"}, {"kind": "paper_additive"}]
# At the output of the attention, and so with the prompt; the base itself at omega = 1; anywhere.
AT_OUTPUT = pytest.mark.parametrize("switches", [OURS, PLAIN, OFFSET, PLAIN_OFFSET, *AUTHORS], ids=str)
BASE_AT_1 = pytest.mark.parametrize("switches", [OURS, PLAIN, OFFSET, PLAIN_OFFSET, LOW_RANK, LORA], ids=str)
VARIANTS = pytest.mark.parametrize("switches", [OURS, PLAIN, OFFSET, PLAIN_OFFSET, LOW_RANK, LORA, *AUTHORS], ids=str)


def build(switches: dict, **more) -> Adapter:
    torch.manual_seed(0)
    return Adapter(config_for(small_layers(), **{"hidden": 8, "rank": 8, "encoder_width": 8, **switches, **more}))


def prompt(rows: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(2))


def prepare(adapter: Adapter, omega: float = 4.0, context=None, **more):
    context = prompt() if context is None else context
    t = torch.full((context.shape[0],), 500.0)
    time = torch.randn(1, TIME_CHANNELS, generator=torch.Generator().manual_seed(3)).expand(len(t), -1)
    return adapter.prepare(torch.tensor([omega]), t, context, dtype=torch.float32, time=time, **more)


def residuals(adapter: Adapter, omega: float = 4.0, context=None, **more) -> dict[str, torch.Tensor]:
    prepared = prepare(adapter, omega, context, **more)
    generator, rows = torch.Generator().manual_seed(1), prepared.context.shape[0]
    found = {}
    for layer in small_layers():
        for linear in adapter.kind.linears(layer):
            x, zeros = torch.randn(rows, 9, linear.inputs, generator=generator), torch.zeros(rows, 9, linear.outputs)
            found[f"{layer.name} {linear.path}"] = adapter.add_at_linear(layer.name, linear.path, zeros, x, prepared)
        if adapter.changes_attention_output:
            h = torch.randn(rows, 9, layer.width, generator=generator)
            zeros = torch.zeros_like(h)
            found[layer.name] = adapter.add_after_attention(layer.name, zeros, h, prepared.context, prepared)
    return found


@VARIANTS
def test_a_new_adapter_adds_exactly_nothing(switches):
    for residual in residuals(build(switches), omega=7.5).values():
        assert torch.count_nonzero(residual) == 0


@VARIANTS
def test_every_parameter_is_trained(switches):
    adapter = randomised(build(switches))
    sum(residual.square().sum() for residual in residuals(adapter, omega=3.0).values()).backward()
    still = [name for name, p in adapter.trained() if p.grad is None or torch.count_nonzero(p.grad) == 0]
    # The softmax of attention is blind to nothing here: five prompt tokens and two of guidance differ.
    assert still == []


@BASE_AT_1
def test_omega_1_adds_exactly_nothing(switches):
    for residual in residuals(randomised(build(switches)), omega=1.0).values():
        assert torch.count_nonzero(residual) == 0


@pytest.mark.parametrize("switches", AUTHORS, ids=str)
def test_the_authors_own_act_at_omega_1_too(switches):
    assert all(residual.abs().max() > 0.01 for residual in residuals(randomised(build(switches)), omega=1.0).values())


@VARIANTS
def test_omega_matters(switches):
    adapter = randomised(build(switches))
    low, high = residuals(adapter, 2.0), residuals(adapter, 8.0)
    assert all(not torch.allclose(low[name], high[name]) for name in low)


@VARIANTS
def test_strength_scales_the_residual(switches):
    adapter = randomised(build(switches))
    one, half = residuals(adapter), residuals(adapter, strength=0.5)
    for name, residual in one.items():
        torch.testing.assert_close(half[name], 0.5 * residual)


@AT_OUTPUT
def test_the_residual_is_added_to_what_is_there(switches):
    adapter = randomised(build(switches))
    prepared, h = prepare(adapter), torch.randn(2, 9, 24)
    alone = adapter.add_after_attention("input_1_0", torch.zeros_like(h), h, prepared.context, prepared)
    torch.testing.assert_close(adapter.add_after_attention("input_1_0", h, h, prepared.context, prepared), h + alone)


@VARIANTS
def test_a_prompt_padded_by_repetition_gives_the_same(switches):
    """ComfyUI pads a short prompt so where it shares a batch with a longer one."""
    adapter = randomised(build(switches, prompt_tokens=5))
    once, thrice = residuals(adapter), residuals(adapter, context=prompt().repeat(1, 3, 1))
    for name, residual in once.items():
        torch.testing.assert_close(thrice[name], residual)


@AT_OUTPUT
def test_rows_do_not_see_each_other(switches):
    adapter, context = randomised(build(switches)), prompt()
    together = residuals(adapter, context=context)
    other = residuals(adapter, context=torch.stack([context[0], context[1] + 1]))
    for name in together:
        torch.testing.assert_close(together[name][0], other[name][0])
        assert not torch.allclose(together[name][1], other[name][1])


@AT_OUTPUT
def test_a_layer_with_another_prompt_uses_it(switches):
    """Other patches may give single blocks a prompt of their own."""
    adapter, h = randomised(build(switches)), torch.randn(2, 9, 24)
    zeros, other = torch.zeros_like(h), prompt() * 2
    changed = adapter.add_after_attention("input_1_0", zeros, h, other, prepare(adapter))
    expected = adapter.add_after_attention("input_1_0", zeros, h, other, prepare(adapter, context=other))
    torch.testing.assert_close(changed, expected)


def test_without_a_shared_encoder_every_layer_has_its_own_omega_and_t_tokens():
    adapter = randomised(build(PLAIN))
    before = residuals(adapter)
    with torch.no_grad():
        adapter.encoders[1].omega[2].bias += 1.0
    after = residuals(adapter)
    assert torch.equal(before["input_1_0"], after["input_1_0"])
    assert not torch.allclose(before["middle_0_0"], after["middle_0_0"])


@pytest.mark.parametrize("switches", [LOW_RANK, LORA], ids=str)
def test_a_linear_layer_changes_as_if_its_weights_did(switches):
    """W x + (omega - 1) * B (m * A x): each row with its own omega and t."""
    adapter, (layer, _), omega = randomised(build(switches)), small_layers(), torch.tensor([3.0, 0.5])
    prepared = adapter.prepare(omega, torch.tensor([900.0, 10.0]), prompt(), dtype=torch.float32)
    for linear in layer.linears:
        base, x = torch.randn(linear.outputs, linear.inputs), torch.randn(2, 9, linear.inputs)
        found = adapter.add_at_linear(layer.name, linear.path, x @ base.T, x, prepared)
        m, key = prepared.shared[0][linear.path], key_of(layer.name, linear.path)
        for row in range(2):
            factor = torch.eye(8) if m is None else m[row, 0].diag()
            change = adapter.kind.to_out[key].weight @ factor @ adapter.kind.down[key].weight
            torch.testing.assert_close(found[row], x[row] @ (base + (omega[row] - 1) * change).T, rtol=1e-4, atol=1e-4)
    assert (m is None) == (switches == LORA)


@pytest.mark.parametrize("switches", [LOW_RANK, LORA], ids=str)
def test_a_linear_layer_of_a_vector_without_tokens_changes_as_one_with_a_token(switches):
    """Such as blocks make their modulation of the timestep's vector by."""
    adapter, (layer, _) = randomised(build(switches)), small_layers()
    prepared = adapter.prepare(torch.tensor([3.0, 0.5]), torch.tensor([900.0, 10.0]), prompt(), dtype=torch.float32)
    for linear in layer.linears:
        x, out = torch.randn(2, linear.inputs), torch.randn(2, linear.outputs)
        found = adapter.add_at_linear(layer.name, linear.path, out, x, prepared)
        with_token = adapter.add_at_linear(layer.name, linear.path, out[:, None], x[:, None], prepared)
        torch.testing.assert_close(found, with_token[:, 0])


def test_modulation_starts_at_one_and_then_tells_t_from_t_and_layer_from_layer():
    def modulation(adapter: Adapter, t: float) -> torch.Tensor:
        prepared = adapter.prepare(torch.tensor([4.0]), torch.tensor([t]), prompt(1), dtype=torch.float32)
        return torch.cat([m for layer in prepared.shared for m in layer.values()])

    new = build(LOW_RANK)
    assert torch.equal(modulation(new, 500.0), torch.ones(20, 1, 8))
    early, late = (modulation(randomised(new), t) for t in (900.0, 10.0))
    assert not torch.isclose(early, late).any()
    assert len(early.unique()) == 20 * 8


def test_a_rank_may_be_any_number():
    adapter = randomised(build(LOW_RANK, rank=3))
    assert {layer.weight.shape[0] for layer in adapter.kind.down.values()} == {3}
    assert all(torch.count_nonzero(residual) for residual in residuals(adapter).values())


def test_a_lora_needs_no_encoder():
    assert len(build(LORA).encoders) == 0
    linears = [linear for layer in small_layers() for linear in layer.linears]
    assert build(LORA).parameter_count() == 8 * sum(linear.inputs + linear.outputs for linear in linears)


def test_log_omega_is_smooth_where_guidance_is_used():
    encoder = build(OURS, encoder_width=64).encoders[0]
    seven, near, far = encoder.embed_omega(torch.tensor([7.0, 7.5, 1.5]))
    assert torch.cosine_similarity(seven, near, dim=0) > 0.95
    assert torch.cosine_similarity(seven, far, dim=0) < 0.8


def test_a_shared_encoder_is_evaluated_once():
    assert prepare(build(OURS)).guidance.tokens.shape == (2, 1, 2, 16)
    assert prepare(build(PLAIN)).guidance.tokens.shape == (2, 2, 2, 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "lora"}, "kind 'lora' is none of delta, low_rank"),
        ({"hidden": 30, "kind": "cross_attention"}, "hidden is 30, but must be a multiple of 4"),
        ({"kind": "low_rank", "rank": 0}, "rank is 0, but must be from 1 to 512"),
        ({"kind": "low_rank", "rank": 513}, "rank is 513, but must be from 1 to 512"),
        ({"kind": "delta", "rank": -1}, "rank is -1, but must be from 0 to 512"),
        ({"kind": "low_rank", "modulated": False, "gain": False}, "would be the same for every guidance scale"),
        ({"kind": "delta", "rank": 4, "gain": False}, "would be the same for every guidance scale"),
        ({"kind": "delta", "encoder_width": 7}, "encoder_width is 7"),
        ({"kind": "paper_attention", "hidden": 7}, "hidden is 7, but must be a multiple of 2"),
        ({"kind": "offset", "omega_embedding": "linear"}, "omega_embedding is 'linear', but must be .* log, fourier"),
    ],
)
def test_settings_of_a_kind_that_cannot_work_say_why(wrong, message):
    with pytest.raises(ValueError, match=message):
        kind_config(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"kind": kind_config("paper_additive")}, "this base has no embedding of the timestep that an adapter could"),
        ({"layers": ()}, "there are no layers"),
        ({"layers": (small_layer("a", "a", 8, 16), small_layer("b", "b", 8, 32))}, "context_dim differ"),
        ({"layers": (small_layer("a", "a", 8, 16), small_layer("a", "a", 8, 16))}, "same name"),
    ],
)
def test_a_config_that_cannot_work_says_why(wrong, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**{"layers": small_layers(), "kind": kind_config("delta"), **wrong})

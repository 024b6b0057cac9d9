"""What must hold of the adapters, whatever their switches."""

import pytest
import torch
from small import randomised, small_sites

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.config import AdapterConfig, Site

OURS = {"kind": "cross_attention"}
PAPER = {"kind": "cross_attention", "gain": False, "omega_embedding": "fourier", "shared_encoder": False}
OFFSET = {"kind": "offset"}
PAPER_OFFSET = {**PAPER, "kind": "offset"}
VARIANTS = pytest.mark.parametrize("switches", [OURS, PAPER, OFFSET, PAPER_OFFSET], ids=str)


def build(switches: dict, **more) -> Adapter:
    torch.manual_seed(0)
    return Adapter(AdapterConfig(sites=small_sites(), **{"hidden": 8, "encoder_width": 8, **switches, **more}))


def residuals(adapter: Adapter, omega: float, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    guidance = adapter.encode(torch.tensor([omega]), torch.full((rows,), 500.0), dtype=torch.float32)
    context = torch.randn(rows, 5, 16, generator=generator)
    inputs = {site.name: torch.randn(rows, 9, site.width, generator=generator) for site in small_sites()}
    return {name: adapter.residual(name, h, context, guidance) for name, h in inputs.items()}


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


@VARIANTS
def test_residuals_broadcast_to_the_attention_output(switches):
    shapes = {name: torch.broadcast_shapes(r.shape, (2, 9, 1)) for name, r in residuals(build(switches), 2.0).items()}
    assert shapes == {site.name: (2, 9, site.width) for site in small_sites()}


@pytest.mark.parametrize("switches", [OURS, OFFSET], ids=str)
def test_with_gain_omega_1_adds_exactly_nothing(switches):
    for residual in residuals(randomised(build(switches)), omega=1.0).values():
        assert torch.count_nonzero(residual) == 0


@VARIANTS
def test_omega_matters(switches):
    adapter = randomised(build(switches))
    low, high = residuals(adapter, 2.0), residuals(adapter, 8.0)
    assert all(not torch.allclose(low[name], high[name]) for name in low)


def test_strength_scales_the_residual():
    adapter = randomised(build(OURS))
    h, context = torch.randn(1, 4, 24), torch.randn(1, 3, 16)
    one, half = (
        adapter.encode(torch.tensor([4.0]), torch.tensor([10.0]), dtype=torch.float32, strength=s) for s in (1.0, 0.5)
    )
    expected = 0.5 * adapter.residual("input_1_0", h, context, one)
    torch.testing.assert_close(adapter.residual("input_1_0", h, context, half), expected)


def test_log_omega_is_smooth_where_guidance_is_used():
    encoder = build(OURS, encoder_width=64).encoders[0]
    seven, near, far = encoder.embed_omega(torch.tensor([7.0, 7.5, 1.5]))
    assert torch.cosine_similarity(seven, near, dim=0) > 0.95
    assert torch.cosine_similarity(seven, far, dim=0) < 0.8


def test_a_shared_encoder_is_evaluated_once():
    assert len(build(OURS).encode(torch.tensor([2.0]), torch.tensor([1.0]), dtype=torch.float32).tokens) == 1
    assert len(build(PAPER).encode(torch.tensor([2.0]), torch.tensor([1.0]), dtype=torch.float32).tokens) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "lora"}, "kind 'lora' is none of cross_attention, offset"),
        ({"hidden": 30}, "hidden is 30"),
        ({"encoder_width": 7}, "encoder_width is 7"),
        ({"sites": ()}, "there are no sites"),
        ({"sites": (Site("a", 8, 16), Site("b", 8, 32))}, "context_dim differ"),
        ({"sites": (Site("a", 8, 16), Site("a", 8, 16))}, "same name"),
    ],
)
def test_a_config_that_cannot_work_says_why(wrong, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**{"sites": small_sites(), **wrong})

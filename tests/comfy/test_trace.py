"""What a training step takes, counted without computing it, against the same counted while it is computed."""

import comfy.model_patcher
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones.unet import UNet
from comfyui_agd.agd_core.comfyui.model import tracing
from comfyui_agd.agd_core.comfyui.model.activation_checkpointing import checkpointed
from comfyui_agd.agd_core.comfyui.model.host import ComfyHost, EncodedPrompt
from comfyui_agd.agd_core.config import AdapterConfig
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.tests.support.runtime import TinyUNet, TinyXL, TwoWidths, tiny
from comfyui_agd.tests.support.small import config_for, randomised

SHAPE = 12, 32, 32


def host_of(base, toy) -> ComfyHost:
    host = ComfyHost(base, toy.clip)
    host.encode(["a red circle"])
    return host


@pytest.fixture
def base():
    """Each test's own: some take it to the meta device."""
    return tiny(TinyUNet())


@pytest.fixture
def host(base, toy):
    return host_of(base, toy)


def config_of(host, kind: str = "cross_attention") -> AdapterConfig:
    return config_for(host.base.layers, kind, hidden=32, encoder_width=32, prompt_tokens=16)


def in_dtype(stored: torch.dtype, computed: torch.dtype | None = None):
    """A base whose weights are stored in one dtype and computed in another."""
    config, cpu = TinyUNet(), torch.device("cpu")
    config.unet_config = {**config.unet_config}
    config.set_inference_dtype(stored, computed)
    return comfy.model_patcher.CoreModelPatcher(config.get_model({}), load_device=cpu, offload_device=cpu)


def student(host, rows: int = 2, checkpointing: bool = False, shape=SHAPE) -> tracing.Traced:
    return host.trace_student(config_of(host), shape, rows, checkpointing)


def computed(host, rows: int, kind: str) -> tracing.Traced:
    """As `student`, but counted while it is really computed."""
    adapter = randomised(Adapter(config_of(host, kind)))
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, conds = torch.randn(rows, *SHAPE), host._conditions([host._example] * rows, torch.Size([rows, *SHAPE]))
    unwanted = conds if adapter.uses_negative else {}
    options = host._with(adapter, torch.full((rows,), 4.0), unwanted, host._options)
    with tracing.Counter() as counter:
        (host._evaluate(x, torch.ones(rows), conds, options) - x).square().mean().backward()
    return counter.traced()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [TinyUNet, TwoWidths])
@pytest.mark.parametrize("kind", KINDS)
def test_the_student_costs_what_it_costs_when_it_is_computed(toy, config, checkpointing, kind):
    host = host_of(tiny(config()), toy)
    with host.session(checkpointing=checkpointing):
        real = computed(host, 2, kind)
    found = host.trace_student(config_of(host, kind), SHAPE, 2, checkpointing)
    assert found.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    assert found.flops == real.flops


def test_the_teacher_costs_what_it_costs_when_it_is_computed(host):
    prompts, x = [host._example] * 2, torch.randn(2, *SHAPE)
    with host.session(), tracing.Counter() as counter:
        host.denoise(x, torch.ones(2), prompts)
    found = host.trace_teacher(SHAPE, 2)
    assert found.peak_bytes == pytest.approx(counter.peak_bytes, rel=0.02)
    assert found.flops == counter.flops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_costs_grow_evenly_with_the_rows(host, checkpointing):
    one, two, four = (student(host, rows, checkpointing) for rows in (1, 2, 4))
    slope = two.peak_bytes - one.peak_bytes
    assert slope > 0
    assert four.peak_bytes == pytest.approx(one.peak_bytes + 3 * slope, rel=0.02)
    assert four.flops == pytest.approx(4 * one.flops, rel=0.02)


def test_checkpointing_lowers_the_peak_for_another_forward_pass(host):
    kept, again, forward = student(host), student(host, checkpointing=True), host.trace_teacher(SHAPE, 2)
    assert again.peak_bytes < 0.6 * kept.peak_bytes
    assert kept.flops < again.flops < kept.flops + 1.1 * forward.flops
    assert forward.peak_bytes < again.peak_bytes


def test_fused_attention_is_linear_in_the_pixels(host):
    small, large = (student(host, shape=(12, side, side)).peak_bytes for side in (32, 64))
    assert large < 4.2 * small


def test_weights_that_are_cast_for_each_call_are_kept_without_checkpointing(toy, base):
    """An fp8 base that computes in fp32: its weights come on top in fp32, unless blocks are checkpointed."""
    plain, lean = host_of(base, toy), host_of(in_dtype(torch.float8_e4m3fn, torch.float32), toy)
    whole = 4 * sum(parameter.numel() for parameter in base.model.diffusion_model.parameters())
    extra = {on: student(lean, 2, on).peak_bytes - student(plain, 2, on).peak_bytes for on in (False, True)}
    assert 0.6 * whole < extra[False] < whole  # those before the first adapter have no backward pass
    assert extra[True] < 0.15 * whole


def test_a_base_in_half_precision_takes_half(toy, base):
    full, half = student(host_of(base, toy)), student(host_of(in_dtype(torch.bfloat16), toy))
    assert half.peak_bytes == pytest.approx(full.peak_bytes / 2, rel=0.1)
    assert half.flops == full.flops


def test_a_model_with_pooled_conditions_is_traced(toy):
    host = ComfyHost(tiny(TinyXL()), toy.clip)
    host._example = EncodedPrompt(
        {"cross_attn": torch.zeros(1, 77, 128), "pooled_output": torch.zeros(1, 1280), "model_conds": {}}, ""
    )
    assert student(host, shape=(4, 32, 32)).peak_bytes > 0


def test_a_model_without_weights_costs_the_same(host):
    real = student(host), host.trace_teacher(SHAPE, 2)
    host._model.model.to("meta")
    assert (student(host), host.trace_teacher(SHAPE, 2)) == real


def everything_in(model) -> list[tuple[str, int]]:
    return [(name, id(value)) for name, value in [*model.named_parameters(), *model.named_buffers()]]


def test_the_model_is_left_as_it_was(host):
    model = host._model.model
    kept, values = everything_in(model), {key: value.clone() for key, value in model.state_dict().items()}
    x, prompts = torch.randn(1, *SHAPE), [host._example]
    with host.session():
        before = host.denoise(x, torch.ones(1), prompts)
    for checkpointing in (False, True):
        student(host, checkpointing=checkpointing)
    host.trace_teacher(SHAPE, 1)
    assert everything_in(model) == kept
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    held = [value for module in model.modules() for value in vars(module).values()]
    assert not any(isinstance(value, FakeTensor) for value in held)
    with host.session():
        assert torch.equal(host.denoise(x, torch.ones(1), prompts), before)


def test_the_model_is_left_as_it_was_by_an_error(host):
    def fail(*_):
        raise ZeroDivisionError

    model = host._model.model
    kept = everything_in(model)
    with pytest.raises(ZeroDivisionError):
        tracing.student(model, fail, config_of(host), SHAPE, 1, checkpointing=True)
    assert everything_in(model) == kept
    assert not any("forward" in vars(module) for module in model.modules())


def test_tracing_works_under_inference_mode_as_nodes_run(host):
    expected = student(host, checkpointing=True)
    with torch.inference_mode():
        assert student(host, checkpointing=True) == expected


def test_the_counter_counts_what_is_alive_and_what_is_multiplied():
    a, q = torch.ones(4, 8), torch.ones(2, 3, 5, 16)
    with tracing.Counter() as counter:
        a.t()[1:].add_(1)  # views and changes in place take nothing
        assert counter.live_bytes == 0
        b = a @ a.t()
        assert counter.live_bytes == 4 * 4 * 4
        del b
        assert counter.live_bytes == 0
        assert counter.traced() == tracing.Traced(4 * 4 * 4, 2 * 4 * 4 * 8)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.flops == 2 * 4 * 4 * 8 + 2 * (2 * 2 * 3 * 5 * 5 * 16)


def test_checkpointing_is_not_left_on(host):
    with checkpointed(UNet(host._model.model.diffusion_model)):
        on = student(host)
    assert on == student(host, checkpointing=True)
    assert student(host).peak_bytes > on.peak_bytes

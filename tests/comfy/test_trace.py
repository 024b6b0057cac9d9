"""What a training step takes, counted without computing it, against the same counted while it is computed."""

import comfy.model_patcher
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones.unet import UNet
from comfyui_agd.agd_core.comfyui.model import tracing
from comfyui_agd.agd_core.comfyui.model.activation_checkpointing import checkpointed
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.denoiser import with_adapter
from comfyui_agd.agd_core.comfyui.model.text_encoder import EncodedPrompt
from comfyui_agd.agd_core.config import AdapterConfig
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.tests.support.runtime import TinyUNet, TinyXL, TwoWidths, tiny
from comfyui_agd.tests.support.small import info_for, randomised

SHAPE = 12, 32, 32


def model_of(base, toy) -> ComfyModel:
    return ComfyModel(base, toy.clip)


def prompt_of(model) -> EncodedPrompt:
    return model.text_encoder.encode(["a red circle"])[0]


@pytest.fixture
def base():
    """Each test's own: some take it to the meta device."""
    return tiny(TinyUNet())


@pytest.fixture
def model(base, toy):
    return model_of(base, toy)


def config_of(model, kind: str = "cross_attention") -> AdapterConfig:
    return info_for(model.base, kind, hidden=32, encoder_width=32, prompt_tokens=16).config


def in_dtype(stored: torch.dtype, computed: torch.dtype | None = None):
    """A base whose weights are stored in one dtype and computed in another."""
    config, cpu = TinyUNet(), torch.device("cpu")
    config.unet_config = {**config.unet_config}
    config.set_inference_dtype(stored, computed)
    return comfy.model_patcher.CoreModelPatcher(config.get_model({}), load_device=cpu, offload_device=cpu)


def student(model, rows: int = 2, checkpointing: bool = False, shape=SHAPE, prompt=None) -> tracing.Traced:
    return model.memory.trace_student(config_of(model), shape, rows, checkpointing, prompt or prompt_of(model))


def teacher(model, rows: int = 2) -> tracing.Traced:
    return model.memory.trace_base(SHAPE, rows, prompt_of(model))


def computed(model, rows: int, kind: str) -> tracing.Traced:
    """As `student`, but counted while it is really computed."""
    adapter = randomised(Adapter(config_of(model, kind)))
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, conds = (
        torch.randn(rows, *SHAPE),
        model.denoiser.conditions([prompt_of(model)] * rows, torch.Size([rows, *SHAPE])),
    )
    options = with_adapter(model.denoiser._options, adapter, torch.full((rows,), 4.0), conds, conds)
    with tracing.Counter() as counter:
        (model.denoiser.evaluate(x, torch.ones(rows), conds, options) - x).square().mean().backward()
    return counter.traced()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [TinyUNet, TwoWidths])
@pytest.mark.parametrize("kind", KINDS)
def test_the_student_costs_what_it_costs_when_it_is_computed(toy, config, checkpointing, kind):
    model = model_of(tiny(config()), toy)
    with model.denoiser.session(checkpointing=checkpointing):
        real = computed(model, 2, kind)
    found = model.memory.trace_student(config_of(model, kind), SHAPE, 2, checkpointing, prompt_of(model))
    assert found.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    assert found.flops == real.flops


def test_the_teacher_costs_what_it_costs_when_it_is_computed(model):
    prompts, x = [prompt_of(model)] * 2, torch.randn(2, *SHAPE)
    with model.denoiser.session(), tracing.Counter() as counter:
        model.denoiser.denoise(x, torch.ones(2), prompts)
    found = teacher(model)
    assert found.peak_bytes == pytest.approx(counter.peak_bytes, rel=0.02)
    assert found.flops == counter.flops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_costs_grow_evenly_with_the_rows(model, checkpointing):
    one, two, four = (student(model, rows, checkpointing) for rows in (1, 2, 4))
    slope = two.peak_bytes - one.peak_bytes
    assert slope > 0
    assert four.peak_bytes == pytest.approx(one.peak_bytes + 3 * slope, rel=0.02)
    assert four.flops == pytest.approx(4 * one.flops, rel=0.02)


def test_checkpointing_lowers_the_peak_for_another_forward_pass(model):
    kept, again, forward = student(model), student(model, checkpointing=True), teacher(model)
    assert again.peak_bytes < 0.6 * kept.peak_bytes
    assert kept.flops < again.flops < kept.flops + 1.1 * forward.flops
    assert forward.peak_bytes < again.peak_bytes


def test_fused_attention_is_linear_in_the_pixels(model):
    small, large = (student(model, shape=(12, side, side)).peak_bytes for side in (32, 64))
    assert large < 4.2 * small


def test_weights_that_are_cast_for_each_call_are_kept_without_checkpointing(toy, base):
    """An fp8 base that computes in fp32: its weights come on top in fp32, unless blocks are checkpointed."""
    plain, lean = model_of(base, toy), model_of(in_dtype(torch.float8_e4m3fn, torch.float32), toy)
    whole = 4 * sum(parameter.numel() for parameter in base.model.diffusion_model.parameters())
    extra = {on: student(lean, 2, on).peak_bytes - student(plain, 2, on).peak_bytes for on in (False, True)}
    assert 0.6 * whole < extra[False] < whole  # those before the first adapter have no backward pass
    assert extra[True] < 0.15 * whole


def test_a_base_in_half_precision_takes_half(toy, base):
    full, half = student(model_of(base, toy)), student(model_of(in_dtype(torch.bfloat16), toy))
    assert half.peak_bytes == pytest.approx(full.peak_bytes / 2, rel=0.1)
    assert half.flops == full.flops


def test_a_model_with_pooled_conditions_is_traced(toy):
    model = ComfyModel(tiny(TinyXL()), toy.clip)
    prompt = EncodedPrompt(
        {"cross_attn": torch.zeros(1, 77, 128), "pooled_output": torch.zeros(1, 1280), "model_conds": {}}, ""
    )
    assert student(model, shape=(4, 32, 32), prompt=prompt).peak_bytes > 0


def test_a_model_without_weights_costs_the_same(model):
    real = student(model), teacher(model)
    model._model.model.to("meta")
    assert (student(model), teacher(model)) == real


def everything_in(unet) -> list[tuple[str, int]]:
    return [(name, id(value)) for name, value in [*unet.named_parameters(), *unet.named_buffers()]]


def test_the_model_is_left_as_it_was(model):
    unet = model._model.model
    kept, values = everything_in(unet), {key: value.clone() for key, value in unet.state_dict().items()}
    x, prompts = torch.randn(1, *SHAPE), [prompt_of(model)]
    with model.denoiser.session():
        before = model.denoiser.denoise(x, torch.ones(1), prompts)
    for checkpointing in (False, True):
        student(model, checkpointing=checkpointing)
    teacher(model, 1)
    assert everything_in(unet) == kept
    assert all(torch.equal(value, values[key]) for key, value in unet.state_dict().items())
    held = [value for module in unet.modules() for value in vars(module).values()]
    assert not any(isinstance(value, FakeTensor) for value in held)
    with model.denoiser.session():
        assert torch.equal(model.denoiser.denoise(x, torch.ones(1), prompts), before)


def test_the_model_is_left_as_it_was_by_an_error(model):
    def fail(*_):
        raise ZeroDivisionError

    unet = model._model.model
    kept = everything_in(unet)
    with pytest.raises(ZeroDivisionError):
        tracing.student(unet, fail, config_of(model), SHAPE, 1, checkpointing=True)
    assert everything_in(unet) == kept
    assert not any("forward" in vars(module) for module in unet.modules())


def test_tracing_works_under_inference_mode_as_nodes_run(model):
    expected = student(model, checkpointing=True)
    with torch.inference_mode():
        assert student(model, checkpointing=True) == expected


def test_the_counter_counts_what_is_alive_and_what_is_multiplied():
    a, q = torch.ones(4, 8), torch.ones(2, 3, 5, 16)
    with tracing.Counter() as counter:
        a.t()[1:].add_(1)  # views and changes in place take nothing
        assert counter.live_bytes == 0
        b = a @ a.t()
        assert counter.live_bytes == 4 * 4 * 4
        del b
        assert counter.live_bytes == 0
        launches, moved = {"add_": 1, "mm": 1}, 4 * (7 * 4) + 4 * (2 * 4 * 8 + 4 * 4)
        assert counter.traced() == tracing.Traced(4 * 4 * 4, 2 * 4 * 4 * 8, launches, moved)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.flops == 2 * 4 * 4 * 8 + 2 * (2 * 2 * 3 * 5 * 5 * 16)


def test_checkpointing_is_not_left_on(model):
    with checkpointed(UNet(model._model.model.diffusion_model)):
        on = student(model)
    assert on == student(model, checkpointing=True)
    assert student(model).peak_bytes > on.peak_bytes

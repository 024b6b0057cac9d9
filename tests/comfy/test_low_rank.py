"""Adapters on the base's linear layers: as if its weights were changed, for the time of one evaluation.

Where their changes are in the weights for a whole sampling: test_merging.py.
"""

from dataclasses import replace
from functools import partial

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import pytest
import torch

from comfyui_agd.agd_core import adapter_file, lora
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.backbones import UnsupportedModel, describe_base
from comfyui_agd.agd_core.comfyui.backbones.linears import LinearHook
from comfyui_agd.agd_core.comfyui.backbones.unet import UNet
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.sampling import merging
from comfyui_agd.agd_core.comfyui.sampling.apply import apply_adapter
from comfyui_agd.agd_core.kinds.low_rank import key_of
from comfyui_agd.tests.support.analytic import CONFIG as ANALYTIC
from comfyui_agd.tests.support.analytic import PROMPTS, RANK, of_kind
from comfyui_agd.tests.support.companions import write_lora
from comfyui_agd.tests.support.runtime import (
    CFG,
    STEPS,
    TinyUNet,
    TinyXL,
    in_dtype,
    ksampler,
    latent,
    patched,
    random_prompts,
    rows_of,
    tiny,
)
from comfyui_agd.tests.support.small import info_for, randomised
from comfyui_agd.training.trainer import train

close = partial(torch.testing.assert_close, atol=2e-4, rtol=2e-4)


@pytest.fixture(autouse=True)
def unmerged(monkeypatch):
    monkeypatch.setattr(merging, "can_merge", lambda guider, lora: False)


@pytest.fixture(scope="module")
def files(base, save_adapter):
    return {modulated: save_adapter(base, kind="low_rank", modulated=modulated) for modulated in (True, False)}


@pytest.fixture(params=[True, False], ids=["modulated", "lora"])
def file(files, request):
    return files[request.param]


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) for module in model.model.diffusion_model.modules())


def with_weights(model, file, omega: float, t: float | None = None):
    """The base with the weights that the adapter is meant to give it."""
    clone, (_, adapter) = model.clone(), adapter_file.load(file)
    times = torch.tensor([0.0 if t is None else t])
    prepared = adapter.prepare(torch.tensor([omega]), times, torch.zeros(1, 16, 128), dtype=torch.float32)
    blocks = UNet(model.model.diffusion_model).blocks()
    names = {module: name for name, module in model.model.named_modules()}
    for index, layer in enumerate(adapter.config.layers):
        for path in (linear.path for linear in layer.linears):
            up, down = (getattr(adapter.kind, part)[key_of(layer.name, path)].weight for part in ("to_out", "down"))
            m = prepared.shared[index][path]
            change = (omega - 1) * (up if m is None else up * m[0]) @ down
            clone.add_patches({f"{names[blocks[layer.name]]}.{path}.weight": (change.detach(),)})
    assert len(clone.patches) == 10 * len(adapter.config.layers)
    return clone


def with_lora(model, file):
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(file)), 1.0, 1.0)[0]


# What it computes


def test_it_costs_one_evaluation(base, prompts, file):
    assert rows_of(patched(base, file), ksampler, prompts) == [1] * STEPS


def test_it_is_the_base_with_other_weights(base, prompts, files):
    sampled = ksampler(patched(base, files[False]), prompts)
    close(sampled, ksampler(with_weights(base, files[False], CFG), prompts, cfg=1.0))
    assert (sampled - ksampler(base, prompts, cfg=1.0)).abs().max() > 0.1


def test_its_weights_depend_on_the_time_where_it_is_modulated(base, prompts, files):
    first = 999.0  # the time of the highest noise level, the only one here
    sampled = ksampler(patched(base, files[True]), prompts, steps=1)
    close(sampled, ksampler(with_weights(base, files[True], CFG, t=first), prompts, cfg=1.0, steps=1))
    other = ksampler(with_weights(base, files[True], CFG, t=0.0), prompts, cfg=1.0, steps=1)
    assert (sampled - other).abs().max() > 0.01


def test_a_picture_of_a_batch_equals_it_alone(base, prompts, file):
    model = patched(base, file)
    close(ksampler(model, prompts, at=latent(3))[:1], ksampler(model, prompts))


def test_prompts_of_a_batch_equal_each_alone(base, file):
    prompts, other = random_prompts(lengths=(16, 16)), random_prompts(lengths=(32, 16), seed=6)
    model = patched(base, file)
    both = replace(prompts, positive=prompts.positive + other.positive)
    one, two = (ksampler(model, p, steps=1) for p in (prompts, replace(other, negative=prompts.negative)))
    close(ksampler(model, both, steps=1), (one + two) / 2)


def test_on_a_model_with_y(save_adapter):
    base, prompts, at = tiny(TinyXL()), random_prompts(pooled=1280), latent(2, channels=4)
    file = save_adapter(base, kind="low_rank", modulated=False)
    expected = ksampler(with_weights(base, file, CFG), prompts, cfg=1.0, at=at)
    close(ksampler(patched(base, file), prompts, at=at), expected)


# What it leaves alone


def test_the_base_is_itself_before_and_after_and_at_omega_1(base, prompts, file):
    guided, plain = ksampler(base, prompts), ksampler(base, prompts, cfg=1.0)
    model = patched(base, file)
    assert not torch.equal(ksampler(model, prompts), guided)
    assert hooks_of(base) == 0
    assert torch.equal(ksampler(model, prompts, cfg=1.0), plain)
    assert torch.equal(ksampler(patched(base, file, strength=0.0), prompts), guided)
    assert torch.equal(ksampler(base, prompts), guided)


def test_a_new_adapter_is_the_base_unguided(base, prompts):
    for modulated in (True, False):
        info = info_for(describe_base(base.model), kind="low_rank", modulated=modulated, hidden=8, encoder_width=8)
        model = apply_adapter(base, info, Adapter(info.config).state_dict(), source="new")
        assert torch.equal(ksampler(model, prompts), ksampler(base, prompts, cfg=1.0))


def test_no_hook_outlives_an_evaluation_that_fails(base, prompts, file):
    last, seen = base.model.diffusion_model.out[-1], []

    def fail(*_):
        seen.append(hooks_of(base))
        raise ZeroDivisionError

    before, handle = ksampler(base, prompts), last.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            ksampler(patched(base, file), prompts)
    finally:
        handle.remove()
    assert seen == [10 * len(describe_base(base.model).layers)]
    assert hooks_of(base) == 0
    assert torch.equal(ksampler(base, prompts), before)


def test_a_layer_that_cannot_be_hooked_leaves_no_hook(base, prompts, file, monkeypatch):
    model, (*_, last) = patched(base, file), UNet(base.model.diffusion_model).blocks().values()
    monkeypatch.setattr(last.ff.net[2], "out_features", 1)
    with pytest.raises(UnsupportedModel, match=r"ff.net.2 in block output_\d_0 .* from 128 to 32 .* from 128 to 1 "):
        ksampler(model, prompts)
    assert hooks_of(base) == 0


def test_a_base_that_is_built_otherwise_is_refused(base, save_adapter):
    class NoSelfAttention(TinyUNet):
        unet_config = {**TinyUNet.unet_config, "disable_self_attentions": [True, True]}

    NoSelfAttention.__name__ = "TinyUNet"  # by which ComfyUI names the family
    other = tiny(NoSelfAttention())
    with pytest.raises(UnsupportedModel, match=r"attn1.to_k in block input_1_0 .* from 32 to 32 .* from 128 to 32"):
        patched(other, save_adapter(base, kind="low_rank", modulated=True))
    assert patched(other, save_adapter(base))  # other kinds don't mind


def test_a_base_without_self_attention_has_its_own_low_rank_adapter(prompts, save_adapter):
    class NoSelfAttention(TinyUNet):
        unet_config = {**TinyUNet.unet_config, "disable_self_attentions": [True, True]}

    other = tiny(NoSelfAttention())
    guided = ksampler(patched(other, save_adapter(other, kind="low_rank", modulated=True)), prompts)
    assert not torch.equal(guided, ksampler(other, prompts, cfg=1.0))


# What else works beside it


def test_a_lora_on_the_base_and_the_adapter_add_up(base, prompts, files, tmp_path):
    style = write_lora(tmp_path / "style.safetensors", base, 0)
    model = patched(with_lora(base, style), files[False])
    assert torch.equal(ksampler(with_lora(patched(base, files[False]), style), prompts), ksampler(model, prompts))
    merged = with_weights(with_lora(base, style), files[False], CFG)
    close(ksampler(model, prompts), ksampler(merged, prompts, cfg=1.0))


def test_adapters_add_up_whatever_their_kinds(base, prompts, files, save_adapter):
    """Those on the linear layers change the weights for the others."""
    plain, modulated = files[False], files[True]
    for kind in ("cross_attention", "offset", "delta"):
        other = save_adapter(base, kind=kind)
        together = ksampler(patched(patched(base, plain), other), prompts)
        close(together, ksampler(patched(patched(base, other), plain), prompts))
        if kind != "delta":  # its negative is looked up in the base's own weights
            close(together, ksampler(patched(with_weights(base, plain, CFG), other), prompts))
    two = patched(patched(base, plain), modulated)
    close(ksampler(two, prompts), ksampler(patched(with_weights(base, plain, CFG), modulated), prompts))
    halves = patched(patched(base, modulated, strength=0.5), modulated, strength=0.5)
    close(ksampler(halves, prompts), ksampler(patched(base, modulated), prompts))


def test_a_rank_beside_delta_is_both_adapters_in_one(base, prompts, save_adapter, tmp_path):
    info, whole = adapter_file.load_weights(save_adapter(base, kind="delta", rank=4, modulated=True))
    inner = "kind.low_rank."
    shared = {key: value for key, value in whole.items() if not key.startswith("kind.")}
    delta = replace(info.config, kind=replace(info.config.kind, rank=0))
    low_rank = replace(delta, kind=info.config.kind.low_rank)
    state = {key: torch.zeros_like(value) for key, value in Adapter(low_rank).state_dict().items()}  # keys and values
    state |= shared | {f"kind.{k.removeprefix(inner)}": v for k, v in whole.items() if k.startswith(inner)}
    # The modulation of all layers is one matrix, in their order.
    linears = [linear for layer in info.config.layers for linear in layer.linears]
    rows = torch.tensor([not linear.reads_prompt for linear in linears]).repeat_interleave(4)
    for part in ("weight", "bias"):
        modulation = whole[f"{inner}to_modulation.{part}"]
        state[f"kind.to_modulation.{part}"] = modulation.new_zeros(len(rows), *modulation.shape[1:])
        state[f"kind.to_modulation.{part}"][rows] = modulation
    apart = apply_adapter(base, replace(info, config=low_rank), state, source="low_rank")
    without = {key: value for key, value in whole.items() if not key.startswith(inner)}
    apart = apply_adapter(apart, replace(info, config=delta), without, source="delta")
    together = apply_adapter(base, info, whole, source="both")
    assert rows_of(together, ksampler, prompts) == [1] * STEPS
    close(ksampler(together, prompts), ksampler(apart, prompts))
    assert hooks_of(base) == 0


FEW_BITS = [(torch.float16, None), (torch.bfloat16, None), (torch.float8_e4m3fn, torch.bfloat16)]


@pytest.mark.parametrize(("stored", "computed"), FEW_BITS, ids=str)
def test_on_a_base_in_few_bits_it_is_what_it_is_but_for_rounding(base, prompts, file, stored, computed):
    lean = in_dtype(base, TinyUNet, stored, computed)
    exact, guided = ksampler(base, prompts, steps=1, cfg=1.0), ksampler(patched(base, file), prompts, steps=1)
    own = (ksampler(lean, prompts, steps=1, cfg=1.0) - exact).norm() / exact.norm()
    found = ksampler(patched(lean, file), prompts, steps=1)
    assert (found - guided).norm() / guided.norm() < 3 * own + 1e-6


def test_on_a_base_that_is_partly_in_system_memory(base, prompts, file, card):
    model = patched(base, file)
    expected = ksampler(model, prompts)
    mm.unload_all_models()
    card(base.model_size() // 2 + 1000, model)
    assert torch.equal(ksampler(model, prompts), expected)
    assert 0 < base.loaded_size() < base.model_size()


# Training


@pytest.mark.parametrize("how", [{"modulated": True}, {"modulated": False}, {"kind": "delta", "rank": 4}], ids=str)
def test_it_learns(base, toy, how):
    settings = {"kind": "low_rank", "rank": RANK, "iterations": 60, "held_out": 1, "evaluate_every": 0}
    config = replace(ANALYTIC, **settings | how)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    trained = train(ComfyModel(base, toy.clip), PROMPTS, config)
    assert sum(trained.losses[-10:]) / 10 < 0.8
    assert all(value > 0 for value in trained.evaluation.gap_closed.values())
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    assert hooks_of(base) == 0


def test_under_autocast_it_leaves_the_dtype_of_the_layers(base, toy, monkeypatch):
    model, seen = ComfyModel(base, toy.clip), set()
    monkeypatch.setattr(model.denoiser, "_autocast", torch.bfloat16)
    call = LinearHook.__call__

    def watch(self, module, inputs, out):
        changed = call(self, module, inputs, out)
        seen.add((out.dtype, changed.dtype))
        return changed

    monkeypatch.setattr(LinearHook, "__call__", watch)
    config = of_kind("low_rank").adapter_config(model.base, 16)
    prompt, omega = model.text_encoder.encode(PROMPTS[:1]), torch.tensor([4.0])
    with model.denoiser.session():
        x = torch.randn(1, 12, 8, 8)
        model.denoiser.student(randomised(Adapter(config)), x, torch.ones(1), prompt, prompt, omega).sum().backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}


# As a file for any LoRA loader


def test_exported_it_is_the_same_in_comfyuis_lora_loader(base, prompts, files, tmp_path):
    for omega in (CFG, 2.0, 0.5):
        exported = lora.export(files[False], tmp_path / f"{omega}.safetensors", omega)
        model = with_lora(base, exported)
        assert len(model.patches) == 10 * len(describe_base(base.model).layers)
        close(ksampler(model, prompts, cfg=1.0), ksampler(patched(base, files[False]), prompts, cfg=omega))

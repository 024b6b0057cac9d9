"""Training on bases as people have them: in half precision, in fp8, with LoRAs, partly in system memory."""

import dataclasses

import comfy.model_management as mm
import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.denoiser import ComfyDenoiser
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.agd_core.mixed_precision import MixedPrecision
from comfyui_agd.tests.support.analytic import CONFIG as ANALYTIC
from comfyui_agd.tests.support.analytic import PROMPTS, assert_same, of_kind
from comfyui_agd.tests.support.runtime import TinyUNet, in_dtype, ksampler, tiny
from comfyui_agd.tests.support.small import randomised
from comfyui_agd.training.trainer import train

CONFIG = dataclasses.replace(ANALYTIC, iterations=8, batch=2, pool=2, held_out=0)


@pytest.fixture
def gradients(toy):
    """A function: the gradients of a fixed step of the student on a model, with the session's options."""

    def of(model, kind: str, **session) -> dict[str, torch.Tensor]:
        trained = ComfyModel(model, toy.clip)
        prompts = trained.text_encoder.encode(PROMPTS[:2])
        torch.manual_seed(0)
        config = of_kind(kind, CONFIG).adapter_config(trained.base, 16)
        adapter = randomised(Adapter(config, MixedPrecision))
        x, sigma, omega = torch.randn(2, 12, 8, 8), torch.tensor([3.0, 1.0]), torch.tensor([4.0, 2.0])
        with trained.denoiser.session(**session):
            trained.denoiser.student(adapter, x, sigma, prompts, prompts[::-1], omega).square().mean().backward()
        return {name: parameter.grad for name, parameter in adapter.named_parameters()}

    return of


FEW_BITS = [(torch.float16, None), (torch.bfloat16, None), (torch.float8_e4m3fn, torch.bfloat16)]


@pytest.mark.parametrize(("stored", "computed"), FEW_BITS, ids=str)
def test_a_base_in_few_bits_trains_an_adapter_in_fp32_and_stays_as_it_is(toy, stored, computed):
    base = in_dtype(tiny(TinyUNet()), TinyUNet, stored, computed)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    config = dataclasses.replace(of_kind("low_rank", CONFIG), iterations=3)  # a new one adds nothing
    trained = train(ComfyModel(base, toy.clip), PROMPTS, config)
    assert {value.dtype for value in trained.adapter.state_dict().values()} == {torch.float32}
    assert trained.losses[0] == pytest.approx(1.0, abs=0.02)
    after = base.model.state_dict()
    assert all(torch.equal(value.view(torch.uint8), after[key].view(torch.uint8)) for key, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stored", "computed"), FEW_BITS, ids=str)
def test_its_gradients_are_those_of_the_base_in_fp32_but_for_rounding(gradients, stored, computed, kind):
    base = tiny(TinyUNet())
    exact, rounded = gradients(base, kind), gradients(in_dtype(base, TinyUNet, stored, computed), kind)
    together = [torch.cat([g.flatten() for g in found.values()]) for found in (exact, rounded)]
    assert torch.cosine_similarity(*together, dim=0) > (0.9 if stored is torch.float8_e4m3fn else 0.99)
    assert all(torch.any(gradient) for gradient in rounded.values())


def test_a_scale_that_overflows_fp16_is_halved_until_it_fits(toy, monkeypatch):
    monkeypatch.setattr("comfyui_agd.training.training_step._LOSS_SCALE", 2.0**40)
    base = in_dtype(tiny(TinyUNet()), TinyUNet, torch.float16)
    trained = train(ComfyModel(base, toy.clip), PROMPTS, dataclasses.replace(CONFIG, iterations=2))
    assert all(value.isfinite().all() for value in trained.adapter.state_dict().values())
    assert any(layer.weight.any() for layer in trained.adapter.zero_initialised())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_that_is_partly_in_system_memory_gives_the_same_gradients(gradients, card, share, checkpointing, kind):
    base = tiny(TinyUNet())
    expected, size = gradients(base, kind), base.model_size()
    mm.unload_all_models()
    card(int(size * share) + 1000, base)
    found = gradients(base, kind, checkpointing=checkpointing, memory=1000)
    assert base.loaded_size() <= size * share
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def with_patch(base, strength: float = 0.5):
    """A LoRA as ComfyUI applies one, on a single weight."""
    model, key = base.clone(), "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    weight = base.model.state_dict()[key]
    model.add_patches({key: (torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)),)}, strength)
    return model


def test_patches_of_the_base_are_part_of_what_is_learnt_and_the_file_says_so(toy):
    base = tiny(TinyUNet())
    patched, plain = ComfyModel(with_patch(base), toy.clip), ComfyModel(base, toy.clip)
    trained, other = train(patched, PROMPTS, CONFIG), train(plain, PROMPTS, CONFIG)
    assert trained.info.training["base_patches"] == {"patched_weights": 1}
    assert "base_patches" not in other.info.training
    assert trained.losses != other.losses


def test_a_patched_base_is_as_it_was_after_training(toy, toy_prompts):
    base = tiny(TinyUNet())
    patched = with_patch(base)
    before = [ksampler(model, toy_prompts) for model in (patched, base)]
    train(ComfyModel(patched, toy.clip), PROMPTS, CONFIG)
    assert all(
        torch.equal(ksampler(model, toy_prompts), expected)
        for model, expected in zip((patched, base), before, strict=True)
    )


class HungryVAE:
    """Finds too little memory to decode, for which ComfyUI moves all other models out."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        mm.free_memory(1e30, torch.device("cpu"))
        return torch.zeros(1, latent.shape[-2], latent.shape[-1], 3)


def test_a_preview_that_moves_the_base_out_changes_nothing_of_a_training(toy):
    config = dataclasses.replace(CONFIG, iterations=4, preview_every=2)
    plain, shown = (ComfyModel(with_patch(tiny(TinyUNet()), 2.0), toy.clip, vae=vae) for vae in (None, HungryVAE()))
    assert_same(*(train(model, PROMPTS, config) for model in (plain, shown)))


def test_after_a_preview_the_base_is_loaded_as_at_the_beginning(toy, card):
    base = with_patch(tiny(TinyUNet()))
    model, size = ComfyModel(base, toy.clip, vae=HungryVAE()), base.model_size()
    card(2 * size, base)
    with model.denoiser.session(memory=1000):
        assert model.denoiser.model.loaded_size() == size
        with torch.no_grad():
            model.picture(torch.zeros(1, *model.denoiser.latent_shape(64, 64)))
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        assert model.denoiser.model.loaded_size() == size


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_base_that_comes_back_in_part_gives_the_same_gradients(gradients, card, share, monkeypatch):
    base = tiny(TinyUNet())
    expected, size = gradients(base, "delta"), base.model_size()
    student = ComfyDenoiser.student

    def after_a_preview(denoiser, *args):
        with denoiser.while_others_load():
            mm.unload_all_models()
            card(int(size * share) + 1000, base)
        return student(denoiser, *args)

    monkeypatch.setattr(ComfyDenoiser, "student", after_a_preview)
    found = gradients(base, "delta", memory=1000)
    assert base.loaded_size() <= size * share
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())

"""Two experts, as Wan 2.2 14B has them: each is trained on the states that it sees, reached through the other."""

import dataclasses
import gc

import comfy.model_management as mm
import comfy.ops
import pytest
import torch

from comfyui_agd.agd_core.comfyui.model import tracing
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.comfyui.model.loading import loaded_models
from comfyui_agd.tests.support.family_adapters import TinyClip
from comfyui_agd.tests.support.tiny_families import tiny_model
from comfyui_agd.training.plan import ExamplePrompts, plan
from comfyui_agd.training.presets import settings_for
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import train

NAME, PROMPTS, BOUNDARY = "wan2.1-t2v", ["a fox", "a green door"], 0.9


class Watched:
    """An expert's network, and the noise levels of its evaluations."""

    def __init__(self, seed: int):
        self.patcher, self.seen = tiny_model(NAME), set()
        with torch.no_grad():
            head = self.patcher.model.diffusion_model.head.head.weight
            head.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) * head.std())
        self.patcher.model.diffusion_model.register_forward_pre_hook(self._see)

    def _see(self, network, inputs) -> None:
        self.seen |= {round(float(t) / 1000, 3) for t in inputs[1]}


def config_of(model: ComfyModel, **settings):
    chosen = {"iterations": 6, "batch": 2, "pool": 2, "steps_min": 5, "steps_max": 6, "evaluate_every": 0, "reuse": 1}
    chosen |= {"width": 64, "height": 64, "preview_every": 3, "learning_rate": 2e-3}
    config = settings_for(model.base, chosen | settings)
    return dataclasses.replace(config, hidden=8, rank=2, vector=8, encoder_width=8)


@pytest.mark.parametrize(("own", "is_high"), [({"sigma_from": BOUNDARY}, True), ({"sigma_to": BOUNDARY}, False)])
def test_an_adapter_learns_where_its_expert_is_and_trajectories_go_through_both(own, is_high):
    experts = Watched(1), Watched(2)
    early = config_of(ComfyModel(experts[0].patcher, TinyClip(NAME)), **own)
    model = ComfyModel(experts[0].patcher, TinyClip(NAME), other_expert=(experts[1].patcher, early.learns_at))
    trained = train(model, PROMPTS, early, options=RunOptions(negative=["", "dark"], held_out=PROMPTS))
    measured = [sigma for pairs in trained.evaluation.by_sigma.values() for sigma, _ in pairs]
    learnt, others = experts[0].seen, experts[1].seen
    if is_high:
        assert min(learnt) >= BOUNDARY > max(others)
        assert min(measured) >= BOUNDARY
    else:  # but for the strip of noise, from which the trained expert keeps what it makes of prompts
        assert max(learnt - {1.0}) < BOUNDARY <= min(others)
        assert max(measured) < BOUNDARY


def test_a_range_that_no_trajectory_comes_to_is_refused():
    model = ComfyModel(tiny_model(NAME), TinyClip(NAME))
    config = config_of(model, sigma_from=0.5001, sigma_to=0.5002)
    with pytest.raises(ValueError, match="no step of a sampling run, of 80 steps even, is at a noise level"):
        train(model, PROMPTS, config, options=RunOptions(negative=[""], held_out=PROMPTS))


@pytest.mark.parametrize(("share", "least", "most"), [(0.4, 0, 0.03), (2.0, 0.2, 0.9), (3.0, 1, 1)])
def test_the_other_expert_has_what_the_trained_one_and_a_step_leave_and_can_be_evaluated(
    monkeypatch, share, least, most
):
    own, other = tiny_model(NAME), tiny_model(NAME)
    size, work = own.model_size(), own.model_size() // 10
    real, card = mm.get_free_memory, share * own.model_size()

    def free(device=None, torch_free_too=False):
        return real(device, True) if torch_free_too else max(0, card - own.loaded_size() - other.loaded_size())

    monkeypatch.setattr(mm, "get_free_memory", free)
    monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 0)
    model = ComfyModel(own, TinyClip(NAME), other_expert=(other, lambda sigma: sigma >= BOUNDARY))
    x, sigma, prompt = torch.ones(1, *model.denoiser.latent_shape(64, 64)), torch.full((1,), 0.5), "a fox"
    with model.denoiser.session(work=work):
        found = model.denoiser.denoise(x, sigma, model.text_encoder.encode([prompt]))
        assert least <= other.loaded_size() / size <= most
        layers = [layer for layer in other.model.modules() if isinstance(layer, comfy.ops.CastWeightBiasOp)]
        assert any(layer.comfy_cast_weights for layer in layers) == (least < 1)
        with model.denoiser.while_others_load():
            assert other.loaded_size() == 0
        assert least <= other.loaded_size() / size <= most
        assert torch.equal(found, model.denoiser.denoise(x, sigma, model.text_encoder.encode([prompt])))
    assert other.loaded_size() == 0
    alone = ComfyModel(tiny_model(NAME), TinyClip(NAME))
    with alone.denoiser.session():
        assert torch.equal(found, alone.denoiser.denoise(x, sigma, alone.text_encoder.encode([prompt])))


def weights_of(model: ComfyModel) -> list[torch.Tensor]:
    both = model.denoiser.model.model, model.denoiser.other.model.model
    return [tensor for network in both for tensor in network.state_dict().values()]


@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn])
def test_the_plan_counts_the_other_expert_as_a_training_holds_it(stored):
    own, other = tiny_model(NAME), tiny_model(NAME, dtype=stored)
    model = ComfyModel(own, TinyClip(NAME), other_expert=(other, lambda sigma: sigma >= BOUNDARY))
    config = dataclasses.replace(config_of(model), checkpointing="on")
    prompts = model.text_encoder.encode(["a fox"] * 4)
    alone = ComfyModel(own, TinyClip(NAME))
    examples = ExamplePrompts(prompts[0], prompts[0])
    found, without = plan(model, config, None, examples), plan(alone, config, None, examples)
    assert found.other_bytes == found.other_bytes_on_device == other.model_size()
    state, held = 20 * found.adapter_parameters, sum(tensor.nbytes for tensor in weights_of(model))
    x = torch.ones(4, *model.denoiser.latent_shape(64, 64))
    with model.denoiser.session(checkpointing=True), tracing.Counter() as counter:
        model.denoiser.denoise(x, torch.full((4,), 0.5), prompts)
    # Other weights are cast when they are asked: that may be the most that a step takes.
    step = max(counter.peak_bytes, without.peak_bytes - state - own.model_size())
    assert found.peak_bytes == pytest.approx(held + state + step, rel=0.02)
    assert (counter.peak_bytes == step) == (stored != torch.float32)


@pytest.mark.parametrize(("share", "least", "most"), [(1.3, 0, 0), (2.2, 0.3, 0.8), (4.0, 1, 1)])
def test_on_a_card_the_other_expert_is_loaded_as_planned(monkeypatch, share, least, most):
    name = "sd3"  # whose layers are all small
    own, other = tiny_model(name), tiny_model(name)
    real, card = mm.get_free_memory, int(share * own.model_size())

    def free(device=None, torch_free_too=False):
        return real(device, True) if torch_free_too else max(0, card - own.loaded_size() - other.loaded_size())

    monkeypatch.setattr(mm, "get_free_memory", free)
    monkeypatch.setattr(mm, "minimum_inference_memory", lambda: own.model_size() // 20)
    model = ComfyModel(own, TinyClip(name), other_expert=(other, lambda sigma: sigma >= BOUNDARY))
    (prompt,) = model.text_encoder.encode(["a fox"])
    found = plan(model, config_of(model, kind="scale"), card, ExamplePrompts(prompt, prompt))
    assert least <= found.other_bytes_on_device / found.other_bytes <= most
    work = found.peak_bytes - found.base_bytes_on_device - found.other_bytes_on_device
    with model.denoiser.session(checkpointing=found.checkpointing, memory=found.reserve, work=work):
        # ComfyUI leaves out whole layers, and has a buffer for those that it fetches.
        layers = max(parameter.nbytes for parameter in other.model.parameters())
        assert found.other_bytes_on_device - 3 * layers <= other.loaded_size() <= found.other_bytes_on_device


def test_a_model_that_is_gone_while_something_has_its_network_is_not_among_the_loaded():
    model = tiny_model(NAME)
    network = model.model
    mm.load_models_gpu([model])
    del model
    gc.collect()
    assert None in mm.loaded_models()
    assert network is not None
    assert None not in loaded_models()

"""Whole training runs on a tiny random UNet through the real runtime."""

from dataclasses import replace

import comfy.model_management as mm
import pytest
import torch

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.tests.support.analytic import CONFIG as ANALYTIC
from comfyui_agd.tests.support.analytic import PROMPTS, Stopped, assert_same, of_kind, stop_after
from comfyui_agd.tests.support.runtime import TinyUNet, ksampler, patched, tiny
from comfyui_agd.training.finite import BaseNotFinite
from comfyui_agd.training.gap import Trajectories, evaluate, follow_teacher
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import Callbacks, train

CONFIG = replace(ANALYTIC, iterations=8, held_out=0, save_every=4)


@pytest.fixture(scope="module")
def new_model(base, toy):
    """One for each run: a run releases the text encoder."""
    return lambda: ComfyModel(base, toy.clip)


@pytest.fixture
def model(new_model):
    return new_model()


def test_training_closes_part_of_the_gap_and_leaves_the_base_alone(base, model):
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    steps = []
    trained = train(
        model, PROMPTS, replace(CONFIG, iterations=60, held_out=1, evaluate_every=0), Callbacks(steps.append)
    )
    assert sum(trained.losses[-10:]) / 10 < 0.8
    assert [p.step for p in steps if p.phase == "train"] == list(range(61))
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    assert all(not p.requires_grad for p in base.model.parameters())
    assert trained.info.training["teacher_evaluations"] >= 2 * 4 * 60
    assert list(trained.evaluation.gap_closed) == [2.3, 5.2, 12.0]
    assert all(value > 0 for value in trained.evaluation.gap_closed.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_the_adapter_moves(model, kind):
    config = of_kind(kind, CONFIG)
    trained = train(model, PROMPTS, config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        start = dict(Adapter(config.adapter_config(model.base, 16)).trained())
    still = [name for name, parameter in trained.adapter.trained() if torch.equal(parameter, start[name])]
    assert still == []


VARIED = replace(CONFIG, aspect_ratios=("1:1", "2:1"), reuse=2, on_policy=0.5, on_policy_from=0.2)


@pytest.fixture(scope="module")
def whole(new_model):
    """The uninterrupted run."""
    return train(new_model(), PROMPTS, VARIED)


def test_the_same_seed_gives_the_same_adapter_to_the_bit(model, whole):
    assert_same(train(model, PROMPTS, VARIED), whole)


def test_another_seed_gives_another_adapter(model, whole):
    assert train(model, PROMPTS, replace(VARIED, seed=1)).losses != whole.losses


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_stopped_run_goes_on_to_the_same_result(new_model, whole, tmp_path, stop):
    """tests/unit/test_trainer.py stops a run everywhere."""
    folder = tmp_path / "a.run"
    with pytest.raises(Stopped):
        train(new_model(), PROMPTS, VARIED, stop_after(stop), options=RunOptions(folder=folder))
    assert_same(train(new_model(), PROMPTS, VARIED, options=RunOptions(folder=folder)), whole)


@pytest.mark.parametrize("at", [2, 10, 11])
def test_a_run_stopped_inside_an_evaluation_goes_on_to_the_same_result(base, new_model, whole, tmp_path, at):
    """ComfyUI's own layers raise when a user interrupts: here while the pool is filled, in the teacher, the student."""
    folder, calls = tmp_path / "a.run", []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == at:
            raise Stopped

    hook = base.model.diffusion_model.middle_block[0].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(Stopped):
            train(new_model(), PROMPTS, VARIED, options=RunOptions(folder=folder))
    finally:
        hook.remove()
    assert_same(train(new_model(), PROMPTS, VARIED, options=RunOptions(folder=folder)), whole)


@pytest.mark.parametrize("negative", [False, True])
def test_a_base_that_is_not_finite_is_named_with_its_prompt_and_dtype(base, new_model, tmp_path, negative):
    """In the real runtime: one prompt of all, positive or negative, makes its activations overflow."""
    text, prompts = "a small green ring on a white background", [*PROMPTS]
    overflowing = new_model().text_encoder.encode([text])[0].cond["cross_attn"]
    prompts, unwanted = (prompts, [text]) if negative else ([*prompts, text], [""])

    def overflow(block, inputs, out):
        rows = [torch.equal(context, overflowing[0]) for context in seen[-1]]
        return torch.where(torch.tensor(rows)[:, None, None, None], out / 0, out)

    seen, unet = [], base.model.diffusion_model
    hooks = [
        unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["context"]), with_kwargs=True),
        unet.middle_block[0].register_forward_hook(overflow),
    ]
    config, options = replace(CONFIG, iterations=30), RunOptions(negative=unwanted, folder=tmp_path / "a.run")
    try:
        with pytest.raises(BaseNotFinite, match=rf"predicts NaN for the prompt '{text}' at .* computed in float32"):
            train(new_model(), prompts, config, options=options)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(train(new_model(), prompts, config, options=options).losses) == 30


def test_training_works_under_inference_mode_as_nodes_run(toy):
    with torch.inference_mode():
        base = tiny(TinyUNet())
        trained = train(ComfyModel(base, toy.clip), PROMPTS, CONFIG)
    assert len(trained.losses) == CONFIG.iterations
    assert not any(value.is_inference() for value in trained.adapter.state_dict().values())


def test_a_checkpoint_without_text_encoder_is_told_what_to_load(base, model):
    """ComfyUI's loader gives None for CLIP then."""
    told = "This checkpoint has no text encoder: load the model's own with CLIPLoader"
    with pytest.raises(ValueError, match=told):
        train(ComfyModel(base, None), PROMPTS, CONFIG)
    with pytest.raises(ValueError, match=told):
        ComfyModel(base, None).text_encoder.length("a star")
    model.text_encoder.release()
    with pytest.raises(ValueError, match="has released its text encoder"):
        model.text_encoder.length("a star")


def test_the_base_samples_the_same_pictures_after_training(base, model, toy_prompts):
    before = ksampler(base, toy_prompts)
    train(model, PROMPTS, CONFIG)
    assert torch.equal(ksampler(base, toy_prompts), before)


def test_sampling_with_the_file_gives_what_training_saw(base, new_model, toy_prompts, tmp_path):
    """One path: the student in training and the patched model in the sampler are the same function."""
    trained, model = train(new_model(), PROMPTS, CONFIG), new_model()
    file = adapter_file.save(tmp_path / "a.safetensors", trained.adapter, trained.info)
    x, omega = torch.randn(1, 12, 8, 8), 4.0
    sigma = model.denoiser.sigmas("normal", 4)[:1]
    prompt = "a small red circle left of a large green star on a white background"
    with model.denoiser.session(), torch.no_grad():
        prompts = model.text_encoder.encode([prompt]), model.text_encoder.encode([""], "negative")
        student = model.denoiser.student(trained.adapter, x, sigma, *prompts, torch.tensor([omega]))

    import comfy.samplers

    guider = comfy.samplers.CFGGuider(patched(base, file))
    guider.set_conds(toy_prompts.positive, toy_prompts.negative)
    guider.set_cfg(omega)
    seen = []

    class OneCall(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *rest):
            seen.append(model_wrap(x, sigma, **extra_args))
            return noise

    with torch.inference_mode():
        guider.sample(x, torch.zeros_like(x), OneCall(), torch.cat([sigma, torch.zeros(1)]))
    torch.testing.assert_close(seen[0], student, atol=1e-4, rtol=1e-4)


def test_the_gap_of_a_new_adapter_is_open(model):
    positive, negative = model.text_encoder.encode(PROMPTS[:2]), model.text_encoder.encode(["", ""], "negative")
    with model.denoiser.session():
        states = follow_teacher(
            model.denoiser, positive, negative, Trajectories(model.denoiser.latent_shape(64, 64), [3.0], steps=3)
        )
        result = evaluate(model.denoiser, Adapter(of_kind("low_rank", CONFIG).adapter_config(model.base, 16)), states)
    assert result.gap_closed[3.0] == pytest.approx(0.0, abs=1e-4)
    assert [sigma for sigma, _ in result.by_sigma[3.0]] == model.denoiser.sigmas("normal", 3)[:3].tolist()


class LargeClip:
    """As HiDream's: hidden states of a language model beside the tokens, here as parts of larger tensors."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        states = torch.ones(2, 3, 5, TinyUNet.unet_config["context_dim"])
        return [[states[:1, 0], {"pooled_output": torch.ones(1, 8), "conditioning_llama3": states[1:], "ids": [7]}]]


def test_all_of_an_encoded_prompt_waits_in_the_dtype_that_the_model_computes_in(monkeypatch):
    base = tiny(TinyUNet())
    monkeypatch.setattr(base.model, "get_dtype_inference", lambda: torch.bfloat16)
    encoder = ComfyModel(base, LargeClip()).text_encoder
    (prompt,) = encoder.encode(["a fox"])
    kept = {name: value for name, value in prompt.cond.items() if isinstance(value, torch.Tensor)}
    assert {name: value.dtype for name, value in kept.items()} == dict.fromkeys(
        ("cross_attn", "pooled_output", "conditioning_llama3"), torch.bfloat16
    )
    assert sum(value.untyped_storage().nbytes() for value in kept.values()) == encoder.bytes_of(prompt)
    assert prompt.cond["ids"] == [7]


@pytest.mark.parametrize("release", ["this", "older"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.1 GB)"), True),
        (getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_out_of_memory_is_told_on_every_device(model, monkeypatch, error, expected, release):
    if release == "older":
        monkeypatch.delattr(mm, "is_oom", raising=False)
    assert model.memory.is_out_of_memory(error) == expected

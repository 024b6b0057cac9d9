"""Whole training runs on a tiny random UNet through the real runtime."""

import dataclasses

import pytest
import torch
from runtime import TinyUNet, ksampler, patched, tiny

from comfyui_agd.agd_core import checkpoint
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.comfyui.host import ComfyHost
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.evaluate import evaluate
from comfyui_agd.training.trainer import Callbacks, DifferentRun, Progress, train

PROMPTS = [
    f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "star", "ring", "cross")
]
CONFIG = TrainConfig(
    iterations=12,
    batch=4,
    pool=2,
    learning_rate=3e-3,
    width=64,
    height=64,
    hidden=8,
    encoder_width=8,
    steps_min=3,
    steps_max=5,
    held_out=1,
    save_every=5,
)


class Stopped(Exception):
    """What a caller raises to stop a run."""


def stop_after(step: int) -> Callbacks:
    def on_progress(progress: Progress) -> None:
        if progress.phase == "train" and progress.step == step:
            raise Stopped

    return Callbacks(on_progress)


@pytest.fixture(scope="module")
def base():
    return tiny(TinyUNet())


@pytest.fixture
def host(base, toy):
    return ComfyHost(base, toy.clip)


def weights(adapter: Adapter) -> torch.Tensor:
    return torch.cat([value.flatten() for value in adapter.state_dict().values()])


def test_training_closes_part_of_the_gap_and_leaves_the_base_alone(base, host):
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    steps = []
    trained = train(host, PROMPTS, dataclasses.replace(CONFIG, iterations=60), Callbacks(steps.append))
    assert trained.losses[0] == pytest.approx(1.0)  # a new adapter closes nothing
    assert sum(trained.losses[-10:]) / 10 < 0.8
    assert [p.step for p in steps if p.phase == "train"] == list(range(1, 61))
    assert all(torch.equal(value, before[key]) for key, value in base.model.state_dict().items())
    assert all(not p.requires_grad for p in base.model.parameters())
    assert trained.info.training["teacher_evaluations"] >= 2 * 4 * 60
    assert len(trained.evaluation.gap_closed) == 2
    assert all(value > 0 for value in trained.evaluation.gap_closed.values())


@pytest.mark.parametrize("kind", ["cross_attention", "offset"])
def test_every_parameter_of_the_adapter_moves(host, kind):
    config = dataclasses.replace(CONFIG, kind=kind)
    trained = train(host, PROMPTS, config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        start = dict(Adapter(config.adapter_config(host.base, 16)).trained())
    still = [name for name, parameter in trained.adapter.trained() if torch.equal(parameter, start[name])]
    assert still == []


def test_the_same_seed_gives_the_same_adapter_to_the_bit(host):
    first, second = train(host, PROMPTS, CONFIG), train(host, PROMPTS, CONFIG)
    assert torch.equal(weights(first.adapter), weights(second.adapter))
    assert first.losses == second.losses
    assert first.evaluation == second.evaluation


def test_another_seed_gives_another_adapter(host):
    other = dataclasses.replace(CONFIG, seed=1)
    assert train(host, PROMPTS, CONFIG).losses != train(host, PROMPTS, other).losses


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_a_stopped_run_goes_on_to_the_same_result(host, tmp_path, stop):
    state = tmp_path / "run.state"
    with pytest.raises(Stopped):
        train(host, PROMPTS, CONFIG, stop_after(stop), state=state)
    assert state.exists()
    resumed = train(host, PROMPTS, CONFIG, state=state)
    whole = train(host, PROMPTS, CONFIG)
    assert torch.equal(weights(resumed.adapter), weights(whole.adapter))
    assert resumed.losses == whole.losses
    assert not state.exists()


def test_a_run_stopped_inside_an_evaluation_goes_on_to_the_same_result(host, tmp_path, monkeypatch):
    """ComfyUI's own layers raise when a user interrupts, in the middle of an iteration."""
    state, calls, real = tmp_path / "run.state", [], host.student

    def student(*args):
        calls.append(1)
        if len(calls) == 7:
            raise Stopped
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(host, "student", student)
        with pytest.raises(Stopped):
            train(host, PROMPTS, CONFIG, state=state)
    resumed, whole = train(host, PROMPTS, CONFIG, state=state), train(host, PROMPTS, CONFIG)
    assert torch.equal(weights(resumed.adapter), weights(whole.adapter))


def test_a_run_with_other_settings_is_refused(host, tmp_path):
    state = tmp_path / "run.state"
    with pytest.raises(Stopped):
        train(host, PROMPTS, CONFIG, stop_after(3), state=state)
    other = dataclasses.replace(CONFIG, learning_rate=1e-5)
    with pytest.raises(DifferentRun, match=r"learning_rate: 0.003 then, 1e-05 now"):
        train(host, PROMPTS, other, state=state)
    assert state.exists()


def test_a_damaged_state_is_refused(host, tmp_path):
    state = tmp_path / "run.state"
    state.write_bytes(b"half a state")
    with pytest.raises(DifferentRun, match="no readable training state"):
        train(host, PROMPTS, CONFIG, state=state)


def test_training_works_under_inference_mode_as_nodes_run(toy):
    with torch.inference_mode():
        base = tiny(TinyUNet())
        trained = train(ComfyHost(base, toy.clip), PROMPTS, CONFIG)
    assert trained.losses[-1] < trained.losses[0]
    assert not weights(trained.adapter).is_inference()


def test_the_base_samples_the_same_pictures_after_training(base, host, toy_prompts):
    before = ksampler(base, toy_prompts)
    train(host, PROMPTS, CONFIG)
    assert torch.equal(ksampler(base, toy_prompts), before)


def test_a_loss_that_is_not_finite_stops_the_run(host, monkeypatch):
    monkeypatch.setattr(host, "student", lambda adapter, x, *rest: x * float("nan"))
    with pytest.raises(FloatingPointError, match="loss became nan at iteration 1; train again with a smaller"):
        train(host, PROMPTS, CONFIG)


def test_sampling_with_the_file_gives_what_training_saw(base, host, toy_prompts, tmp_path):
    """One path: the student in training and the patched model in the sampler are the same function."""
    trained = train(host, PROMPTS, CONFIG)
    file = checkpoint.save(tmp_path / "a.safetensors", trained.adapter, trained.info)
    x, omega = torch.randn(1, 12, 8, 8), 4.0
    sigma = host.sigmas("normal", 4)[:1]
    shape = host.latent_shape(64, 64)
    prompt = "a small red circle left of a large green star on a white background"
    with host.session(), torch.no_grad():
        student = host.student(trained.adapter, x, sigma, host.encode([prompt], shape), torch.tensor([omega]))

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
    torch.testing.assert_close(seen[0], student, atol=1e-5, rtol=1e-5)


def test_the_gap_of_a_new_adapter_is_open(host):
    shape = host.latent_shape(64, 64)
    positive, negative = host.encode(PROMPTS[:2], shape), host.encode([""], shape, "negative")[0]
    with host.session():
        result = evaluate(
            host, Adapter(CONFIG.adapter_config(host.base, 16)), positive, negative, shape, [3.0], steps=3
        )
    assert result.gap_closed[3.0] == pytest.approx(0.0, abs=1e-4)
    assert [sigma for sigma, _ in result.by_sigma[3.0]] == host.sigmas("normal", 3)[:3].tolist()

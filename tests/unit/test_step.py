"""One optimiser step: the loss, its parts, and what happens when memory runs out."""

from dataclasses import dataclass, replace

import pytest
import torch

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, TOKENS, AnalyticModel, Stopped, assert_close, stop_after
from comfyui_agd.tests.support.small import randomised
from comfyui_agd.training.distributed import Ranks
from comfyui_agd.training.memory import BothPredictions
from comfyui_agd.training.model import EncodedPrompts
from comfyui_agd.training.pool import Batch
from comfyui_agd.training.run_folder import RunFolder
from comfyui_agd.training.run_setup import RunOptions, new_adapter
from comfyui_agd.training.run_state import RunState
from comfyui_agd.training.trainer import train
from comfyui_agd.training.training_step import StudentLoss, TrainingStep, initial_loss_scale

UNMEASURED = replace(CONFIG, held_out=0)


@dataclass
class Parts:
    """What `train` works with: the step, and the state that it changes."""

    model: AnalyticModel
    step: TrainingStep
    state: RunState
    both: BothPredictions

    @property
    def adapter(self) -> Adapter:
        return self.state.adapter

    def gradients(self, batch: Batch) -> StudentLoss:
        return self.step.gradients(self.state, batch)


def parts_of(model: AnalyticModel | None = None, config=CONFIG, new: bool = False) -> Parts:
    """Of a run whose adapter does something, unless it is `new`."""
    model = model or AnalyticModel()
    prompts, ranks = EncodedPrompts(model.encode(PROMPTS), model.encode([""])), Ranks()
    adapter = new_adapter(config.adapter_config(model.base, TOKENS), config.seed, prompts.negative[0], model.device)
    state = RunState.begin(adapter, None, config.learning_rate, initial_loss_scale(model.computes_in))
    step = TrainingStep(model, model, prompts, config, ranks, config.micro_batch or config.batch)
    if not new:
        randomised(adapter)
    return Parts(model, step, state, BothPredictions(model, model, 2 * config.batch))


def batch_of(parts: Parts, omega=(1.5, 3.0, 6.0, 12.0), sigma=(10.0, 3.0, 1.0, 0.2), seed: int = 0) -> Batch:
    count = len(omega)
    x = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    positive, negative, sigma = torch.arange(count), torch.zeros(count, dtype=torch.long), torch.tensor(sigma)
    x = x * sigma[:, None, None, None]
    cond, uncond = parts.both(x, sigma, *parts.step.prompts.of_rows(positive, negative))
    return Batch(x, sigma, torch.tensor(omega), positive, negative, cond, uncond)


def gradients(parts: Parts) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in parts.adapter.parameters()])


def predicts(parts: Parts, monkeypatch, student) -> None:
    """The student is what `student(batch)` makes of it, with a gradient to the adapter."""
    answers = iter([])

    def answer(adapter, x, sigma, positive, negative, omega):
        return next(answers) + 0 * sum(p.sum() for p in adapter.parameters())

    monkeypatch.setattr(parts.model, "student", answer)
    of_batch = parts.gradients

    def gradients_of(batch):
        nonlocal answers
        answers = iter([student(batch)])
        return of_batch(batch)

    monkeypatch.setattr(parts, "gradients", gradients_of)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_balanced_loss_is_the_share_of_the_gap_that_is_open(monkeypatch, share):
    parts = parts_of()
    batch = batch_of(parts)
    predicts(parts, monkeypatch, lambda b: b.cond + share * (b.target - b.cond))
    _, loss, of_none = parts.gradients(batch)
    assert loss == pytest.approx((1 - share) ** 2, abs=1e-5)
    assert of_none == loss


@pytest.mark.parametrize("loss", ["balanced", "plain"])
def test_a_new_adapter_has_the_loss_of_none(loss):
    parts = parts_of(config=replace(CONFIG, loss=loss, kind="cross_attention"), new=True)
    assert parts.gradients(batch_of(parts))[2] == pytest.approx(1.0, rel=1e-4)


def test_the_plain_loss_is_the_mean_square_error_of_eps():
    parts = parts_of(config=replace(CONFIG, loss="plain"))
    batch = batch_of(parts)
    student, loss, _ = parts.gradients(batch)
    error = (student - batch.target) / batch.sigma[:, None, None, None]
    assert loss == pytest.approx(error.square().mean().item(), rel=1e-5)


def test_the_loss_is_in_units_of_what_the_base_predicts(monkeypatch):
    """A base that predicts half of eps makes twice the error with it."""
    parts = parts_of(config=replace(CONFIG, loss="plain"))
    batch = batch_of(parts)
    of_eps = parts.gradients(batch).loss
    monkeypatch.setattr(parts.model, "prediction_unit", lambda sigma: 2 * sigma)
    assert parts.gradients(batch).loss == pytest.approx(of_eps / 4)


@pytest.mark.parametrize(("loss", "alike"), [("balanced", True), ("plain", False)])
def test_the_balanced_loss_weighs_weak_and_strong_guidance_alike(monkeypatch, loss, alike):
    """All of one row done and nothing of the other, and the other way round: alike; under MSE they are not."""
    parts, losses = parts_of(config=replace(CONFIG, loss=loss)), []
    batch = batch_of(parts, omega=(2.0, 12.0), sigma=(1.0, 1.0))
    for done in (0, 1):

        def student(b, done=done):
            out = b.cond.clone()
            out[done] = b.target[done]
            return out

        with monkeypatch.context() as patch:
            predicts(parts, patch, student)
            losses.append(parts.gradients(batch)[1])
    ratio = max(losses) / min(losses)
    assert ratio < 4 if alike else ratio > 50


def test_rounding_errors_at_omega_near_1_hardly_count(monkeypatch):
    parts = parts_of()
    batch = batch_of(parts, omega=(1.001, 3.0, 3.0, 3.0), sigma=(1.0,) * 4)

    def student(b):
        out = b.target.clone()
        out[0] += 0.01
        return out

    predicts(parts, monkeypatch, student)
    assert parts.gradients(batch)[1] < 0.01


def test_a_batch_without_guidance_survives():
    """Its gap is a rounding error, which the adapter, dropped at omega 1, can't be blamed for."""
    parts = parts_of()
    _, loss, _ = parts.gradients(batch_of(parts, omega=(1.0,) * 4))
    assert 0 <= loss <= 1 + 1e-4
    assert (gradients(parts) == 0).all()


@pytest.mark.parametrize("loss", ["balanced", "plain"])
def test_micro_batches_have_the_gradients_of_the_batch(loss):
    found = {}
    for rows in (4, 3, 2, 1):
        parts = parts_of(config=replace(CONFIG, loss=loss, micro_batch=rows))
        student, value, share = parts.gradients(batch_of(parts))
        found[rows] = gradients(parts), student, torch.tensor([value, share])
    assert found[4][0].abs().max() > 0
    for rows in (3, 2, 1):
        for one, other in zip(found[4], found[rows], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fits", [3, 2, 1])
def test_out_of_memory_goes_on_from_the_same_step_with_fewer_rows(fits, caplog):
    model = AnalyticModel(most_rows=fits)
    trained, whole = train(model, PROMPTS, UNMEASURED), train(AnalyticModel(), PROMPTS, UNMEASURED)
    assert_close(trained, whole)
    found = [2] if fits > 1 else [2, 1]
    lines = [record.getMessage() for record in caplog.records]
    assert [f"the adapter goes on from the same step with {rows} rows at a time" in line for rows, line in
            zip(found, lines, strict=True)] == [True] * len(found)  # fmt: skip
    assert model.student_rows[-1] == found[-1]
    assert sum(rows > fits for rows in model.student_rows) == len(found)


def test_out_of_memory_in_the_middle_of_a_batch_leaves_no_gradients_behind(monkeypatch):
    """A second part that fails after the first one's backward pass."""
    parts, whole = parts_of(config=replace(CONFIG, micro_batch=2)), parts_of()
    batch, calls, real = batch_of(parts), [], parts.model.student

    def student(*args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(*args)

    monkeypatch.setattr(parts.model, "student", student)
    parts.gradients(batch)
    whole.gradients(batch)
    assert len(calls) == 2 + 4
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-5)


def test_out_of_memory_with_a_single_row_comes_through(tmp_path):
    with pytest.raises(torch.cuda.OutOfMemoryError, match="Tried to allocate everything"):
        train(AnalyticModel(most_rows=0), PROMPTS, UNMEASURED, options=RunOptions(folder=tmp_path / "a.run"))
    goes_on = train(AnalyticModel(), PROMPTS, UNMEASURED, options=RunOptions(folder=tmp_path / "a.run"))
    assert_close(goes_on, train(AnalyticModel(), PROMPTS, UNMEASURED))


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch, caplog):
    model = AnalyticModel()
    monkeypatch.setattr(model, "student", lambda *_: (_ for _ in ()).throw(RuntimeError("mat1 and mat2 don't fit")))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(model, PROMPTS, UNMEASURED)
    assert not caplog.records


def test_the_teacher_is_asked_in_fewer_rows_when_memory_runs_out(monkeypatch, caplog):
    model, real = AnalyticModel(), AnalyticModel.denoise

    def denoise(x, sigma, prompts):
        if len(x) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(model, x, sigma, prompts)

    monkeypatch.setattr(model, "denoise", denoise)
    assert_close(train(model, PROMPTS, UNMEASURED), train(AnalyticModel(), PROMPTS, UNMEASURED))
    assert caplog.text.count("the teacher goes on from the same step with 4 rows at a time") == 1


def test_the_teacher_is_asked_for_whole_batches_after_the_pool_was_filled():
    """Filling asks for few rows at its end, which says nothing of what fits."""
    model = AnalyticModel()
    train(model, PROMPTS, replace(UNMEASURED, batch=3, iterations=5))
    assert model.base_rows[-2:] == [6, 3]  # both branches; the student's own


class HalfModel(AnalyticModel):
    """Computes as fp16 does: gradients that leave the student below 6e-8 are lost, above 65504 infinite."""

    computes_in = torch.float16

    def student(self, *args):
        out = super().student(*args)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient.half().float())
        return out


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_in_fp16_neither_small_nor_large_gradients_are_lost(size, monkeypatch):
    found = []
    for model in (HalfModel(), AnalyticModel()):
        parts = parts_of(model, replace(CONFIG, loss="plain"))
        batch, weights = batch_of(parts), parts.step._row_weights
        monkeypatch.setattr(parts.step, "_row_weights", lambda *of, weights=weights: (weights(*of)[0] * size, 1.0))
        parts.gradients(batch)
        found.append(gradients(parts) / size)
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2 * found[1].abs().max().item())


@pytest.mark.parametrize(("first", "then"), [(HalfModel, AnalyticModel), (AnalyticModel, HalfModel)])
def test_a_run_that_goes_on_in_another_precision_begins_with_its_scale_of_the_loss(tmp_path, first, then):
    folder, config = RunOptions(folder=tmp_path / "a.run"), replace(UNMEASURED, kind="scale")
    with pytest.raises(Stopped):
        train(first(), PROMPTS, config, stop_after(5), options=folder)
    with pytest.raises(Stopped):
        train(then(), PROMPTS, replace(config, precision="bf16"), stop_after(6), options=folder)
    saved = RunFolder(folder.folder).load_run_state()
    assert (saved["step"], saved["loss_scale"] > 1) == (6, then is HalfModel)

"""benchmarks/recipe.py: the recipe of the paper's authors beside ours."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.benchmarks import authors_recipe, recipe
from comfyui_agd.benchmarks.authors_recipe import Distillation, StoredTrajectories, learning_rate, own_prediction
from comfyui_agd.examples.toy.sampling import Toy, held_out_captions
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.run_setup import new_adapter

STEPS, ROWS = 6, 2


@pytest.fixture(scope="module")
def model() -> ComfyModel:
    toy = Toy.load()
    return ComfyModel(toy.model, toy.clip)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return held_out_captions(ROWS, 0)[1]


@pytest.fixture(scope="module")
def stored(model, captions) -> StoredTrajectories:
    return StoredTrajectories(**authors_recipe.store(model, captions, (64, 64), 6.0, STEPS))


def test_what_is_stored_is_cfgs_own_eps_at_states_of_noisy_trajectories(model, captions, stored):
    assert stored.evaluations == 2 * STEPS * ROWS
    assert stored.x.dtype == stored.out.dtype == torch.float16
    positive, negative = model.text_encoder.encode(captions), model.text_encoder.encode([""], "negative") * ROWS
    for i in (0, STEPS - 1):
        x, sigma = stored.x[i].float(), stored.sigma[i].expand(ROWS)
        with model.denoiser.session():
            cond, uncond = (model.denoiser.denoise(x, sigma, each) for each in (positive, negative))
        eps = [(x - each) / sigma[:, None, None, None] for each in (cond, uncond)]
        expected = eps[1] + stored.omega[:, None, None, None] * (eps[0] - eps[1])
        assert (stored.out[i] - expected).square().mean() < 1e-3 * expected.square().mean()


def test_no_state_comes_twice_and_a_trajectory_has_one_omega(stored):
    batches = [stored.batch(step, 4) for step in range(STEPS * ROWS // 4)]
    seen = [(row, sigma) for each in batches for row, sigma in zip(each.row.tolist(), each.sigma.tolist(), strict=True)]
    assert len(set(seen)) == STEPS * ROWS
    assert all(torch.equal(each.omega, stored.omega[each.row]) for each in batches)


def test_the_learning_rate_begins_and_ends_at_a_ten_thousandth():
    rates = [learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[0] == pytest.approx(2e-4) == pytest.approx(rates[-1])
    assert rates[10] == max(rates) == 2.0
    assert rates[5] == pytest.approx(1.0, rel=1e-3)
    assert rates[55] == pytest.approx(1.0, rel=1e-3)


def test_it_learns_by_the_plain_error_of_what_the_model_predicts(model, captions, stored):
    """Its first step is AdamW's, on the gradient of that error, whatever its norm."""
    encode, denoiser = model.text_encoder.encode, model.denoiser
    positive, (negative,) = encode(captions), encode([""], "negative")
    config = TrainConfig(kind="paper_attention", hidden=8).adapter_config(model.base, 16)

    def made():
        return new_adapter(config, 0, model.text_encoder.context(negative), denoiser.device)

    adapter, expected = made(), made()
    states = stored.batch(0, 4)
    prompts = [positive[i] for i in states.row.tolist()]
    with denoiser.session():
        Distillation(0.1, 1, 4)(denoiser, adapter, stored, positive, negative)
        student = denoiser.student(expected, states.x, states.sigma, prompts, [negative] * 4, states.omega)
        F.mse_loss(own_prediction(denoiser, states.x, states.sigma, student), states.out).backward()
    optimiser = torch.optim.AdamW(expected.parameters(), lr=learning_rate(0, 1, 0.1), weight_decay=0.0)
    optimiser.step()
    for own, other in zip(adapter.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    assert any(p.abs().max() > 0 for p in adapter.kind.to_out.parameters())


@pytest.mark.slow
def test_one_command_compares_both_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(authors_recipe, "STEPS", 16)
    how = ["--quick", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    recipe.main([*how, "--only", "paper, paper_attention, learning rate tuned", "each state once", "last 4 batches"])
    rows = json.loads((tmp_path / "results" / "recipe.json").read_text())
    paper, ours = ([row for row in rows if row["recipe"] == name] for name in ("paper", "ours"))
    assert {row["teacher_evaluations"] for row in paper} == {2 * 16 * 2}
    assert paper[-1]["learning_rate"] in recipe.RATES
    assert {row["variant"] for row in ours} == {"each state once", "4 times, of the last 4 batches"}
    once = [row["teacher_evaluations"] for row in ours if row["variant"] == "each state once"]
    assert once == sorted(once)
    assert all(math.isfinite(row["gap_closed"]) for row in rows)
    page = (tmp_path / "results" / "recipe.md").read_text()
    assert "| paper | `paper_attention` | learning rate tuned |" in page
    assert (tmp_path / "results" / "recipe.png").exists()


def test_ours_is_said_to_reach_the_paper_where_it_first_does():
    def row(recipe_of: str, evaluations: int, gap: float) -> dict:
        return {"recipe": recipe_of, "adapter": "a", "variant": "v", "teacher_evaluations": evaluations} | {
            "gap_closed": gap
        }

    by_paper = [row("paper", 1000, 0.3), row("paper", 1000, 0.5)]
    _, line = recipe.reached([*by_paper, row("ours", 50, 0.4), row("ours", 100, 0.6), row("ours", 200, 0.7)])
    assert "at 100, 1/10 of them (0.600)" in line
    _, line = recipe.reached([*by_paper, row("ours", 50, 0.4)])
    assert "not reached" in line

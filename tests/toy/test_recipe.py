"""benchmarks/recipe.py: the paper's recipe beside ours."""

from dataclasses import replace

import pytest

from comfyui_agd.agd_core.comfyui.model.comfy_model import ComfyModel
from comfyui_agd.benchmarks import recipe
from comfyui_agd.examples.toy.sampling import Toy, held_out_captions


@pytest.mark.slow
def test_the_papers_recipe_learns_from_whole_trajectories_recorded_before(monkeypatch):
    monkeypatch.setattr(recipe, "STEPS", 8)
    monkeypatch.setattr(recipe, "BATCH", 4)
    toy, captions = Toy.load(), held_out_captions(3, 0)[1]
    model = ComfyModel(toy.model, toy.clip)
    paper = next(each for each in recipe.recipes(1.0) if each.recipe == "paper")
    paper = replace(paper, config=replace(paper.config, iterations=3, batch=4, hidden=8, evaluate_every=0))
    recorded = recipe.RecordedTrajectories(model, captions[:2])
    (row,) = recipe.measure(model, paper, captions[:2], captions[2:], recorded)
    assert (row["iteration"], row["teacher_evaluations"]) == (3, 2 * 8 * 2)

"""What is measured on held-out prompts, and that a training which can't be measured never begins."""

from dataclasses import replace

import pytest
import torch

from comfyui_agd.agd_core.guidance import RULES, GuidanceRule
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel
from comfyui_agd.training.finite import TargetNotFinite
from comfyui_agd.training.gap import Trajectories, follow_teacher, omegas_of
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import train

SHORT = replace(CONFIG, iterations=2, evaluate_every=0)
# Between two of twenty steps of the analytic base's "normal" schedule.
NARROW = {"sigma_from": 8.8, "sigma_to": 8.95, "steps_min": 20, "steps_max": 30, "schedulers": ("karras",)}
INTERVAL = {"teacher": "interval", "interval_sigma_min": 1.3, "interval_sigma_max": 1.5, "steps_min": 20}


@pytest.mark.parametrize("settings", [NARROW, INTERVAL | {"steps_max": 30}])
def test_a_range_between_two_steps_is_measured_on_trajectories_of_more_steps(settings):
    measured = train(AnalyticModel(), PROMPTS, replace(SHORT, **settings)).evaluation
    low, high = (1.3, 1.5) if "teacher" in settings else (8.8, 8.95)
    levels = [sigma for sigma, _ in measured.by_sigma[12.0]]
    assert levels
    assert all(low <= sigma <= high for sigma in levels)


def test_what_no_step_of_a_measurement_comes_to_is_refused_before_anything_is_evaluated():
    model, config = AnalyticModel(), replace(SHORT, **NARROW | {"sigma_from": 8.873, "sigma_to": 8.874})
    config = replace(config, steps_max=400)
    with pytest.raises(ValueError, match=r"The training couldn't be measured: .* Choose a wider range"):
        train(model, PROMPTS, config)
    assert model.base_rows == []


def test_a_training_whose_held_out_prompts_are_their_negative_ones_is_refused_before_anything_is_evaluated():
    model, options = AnalyticModel(), RunOptions(negative=["a fox"], held_out=["a fox", "a fox"])
    with pytest.raises(ValueError, match=r"^Guidance would change nothing of what is measured"):
        train(model, PROMPTS, SHORT, options=options)
    assert model.base_rows == []
    train(model, PROMPTS, SHORT, options=replace(options, held_out=["a fox", "an owl"]))


def test_steps_are_kept_where_they_are_learnt():
    trajectories = Trajectories((1, 2, 2), [3.0], steps=5, keep=3, where=lambda sigma: sigma < 4)
    assert trajectories.kept_steps(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])) == {2, 4}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_where_it_guides(name):
    rule, sigma = GuidanceRule(name, sigma_min=1.0, sigma_max=3.0), torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])
    x, cond, uncond = torch.randn(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = (rule(x, sigma, cond, uncond, torch.full((5,), 4.0)) - cond).flatten(1).abs().amax(1) > 0
    assert rule.guides_at(sigma).tolist() == changed.tolist()


@pytest.mark.parametrize("most", [1.04, 1.1, 1.15, 1.2])
def test_nothing_is_measured_without_guidance(most):
    omegas = omegas_of(replace(CONFIG, omega_max=most))
    assert omegas[-1] == most
    assert all(omega > 1 for omega in omegas)


def test_the_usual_guidance_scales_are_measured():
    assert omegas_of(CONFIG) == [2.3, 5.2, 12.0]


def test_guidance_that_is_no_number_while_measuring_is_not_the_bases_fault():
    model, trajectories = AnalyticModel(), Trajectories((2, 8, 8), [float("inf")], steps=4)
    with pytest.raises(TargetNotFinite, match=r"^The teacher's guidance \(cfg\) is NaN or infinite"):
        follow_teacher(model, model.encode(["a fox"]), model.encode([""]), trajectories)

"""What is cheaper than CFG: the rules by which others leave out evaluations, and a small run of the benchmark."""

import functools
import json

import pytest
import torch
from PIL import Image

from comfyui_agd.agd_core.comfyui.counting import counted
from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.benchmarks import experiment, frontier, frontier_report, sparse_guidance, step_caches
from comfyui_agd.benchmarks.frontier_methods import FRONTIER, Group
from comfyui_agd.benchmarks.sparse_guidance import (
    LinearEstimate,
    Predictions,
    SparseGuidance,
    Step,
    no_guidance,
    same_difference,
    sparse,
)
from comfyui_agd.benchmarks.step_caches import SpectrumSettings, spectrum
from comfyui_agd.examples.toy.sampling import SamplerSettings, Toy, encode, held_out_captions, sample

ROWS = 3


@pytest.fixture(scope="module")
def parts() -> Toy:
    return Toy.load()


def drawn(parts: Toy, model, steps: int = 6, cfg: float = 3.0, **batches) -> tuple[torch.Tensor, list[int]]:
    """The final latents of a sampling, and the rows of every evaluation."""
    model, counter = counted(model)
    prompts = encode(parts.clip, held_out_captions(ROWS, 5)[1])
    settings = SamplerSettings(cfg, 1, steps=steps, scheduler=parts.base.scheduler)
    return sample(parts, model, prompts, settings, **batches).latents, counter.rows


@pytest.fixture
def draw(parts):
    return functools.partial(drawn, parts)


def step(index: int, count: int, latents: torch.Tensor | None = None, sigma: float = 2.0) -> Step:
    x = torch.zeros(1, 1, 8, 8) if latents is None else latents
    return Step(index, count, x, torch.full((len(x),), sigma))


def predicted(index: int, count: int, cond: torch.Tensor, uncond: torch.Tensor, evaluated: bool = True) -> Predictions:
    return Predictions(step(index, count, cond), cond, uncond, torch.full((len(cond),), evaluated))


@pytest.mark.parametrize(
    ("when", "estimate"),
    [
        (sparse_guidance.always, no_guidance),
        (sparse_guidance.every(1), same_difference),
        (sparse_guidance.first(1.0), no_guidance),
        (sparse_guidance.thinned(1.0), sparse_guidance.growing_difference),
    ],
)
def test_what_leaves_nothing_out_is_cfg(parts, draw, when, estimate):
    latents, rows = draw(sparse(parts.model, when, estimate))
    assert rows == [2 * ROWS] * 6
    assert torch.equal(latents, draw(parts.model)[0])


def test_a_flow_model_samples_in_the_same_ways():
    flow = Toy.load("toy-dit")
    cfg = drawn(flow, flow.model)[0]
    latents, rows = drawn(flow, sparse(flow.model, sparse_guidance.every(2), same_difference))
    assert rows == [2 * ROWS, ROWS] * 3
    assert (latents - cfg).norm() < (drawn(flow, flow.model, cfg=1.0)[0] - cfg).norm()
    latents, rows = drawn(flow, spectrum(flow.model, SpectrumSettings(warm_up=3, last=1)), 8)
    assert rows == [2 * ROWS] * 6
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("when", "steps", "expected"),
    [
        (sparse_guidance.every(2), 6, [2, 1, 2, 1, 2, 1]),
        (sparse_guidance.every(3), 7, [2, 1, 1, 2, 1, 1, 2]),
        (sparse_guidance.every(2, until=0.5), 8, [2, 1, 2, 1, 1, 1, 1, 1]),
        (sparse_guidance.first(0.4), 5, [2, 2, 1, 1, 1]),
        (sparse_guidance.faster_cache, 15, [2] * 5 + [2, 1, 1, 1, 1] * 2),
        (sparse_guidance.thinned(0.4), 10, [2, 2, 1, 2, 1, 1, 2, 1, 1, 1]),
    ],
)
def test_the_negative_is_evaluated_where_the_schedule_says(parts, draw, when, steps, expected):
    rows = draw(sparse(parts.model, when, same_difference), steps)[1]
    assert [n // ROWS for n in rows] == expected


def test_a_new_sampling_begins_anew(parts, draw):
    model = sparse(parts.model, sparse_guidance.every(4), same_difference)
    (once, rows), (again, same) = draw(model), draw(model)
    assert torch.equal(once, again)
    assert rows == same


def test_without_guidance_between_them_steps_are_those_of_the_prompt_alone(parts, draw):
    latents, rows = draw(sparse(parts.model, sparse_guidance.first(0.0)))
    assert rows == [ROWS] * 6
    torch.testing.assert_close(latents, draw(parts.model, cfg=1.0)[0], atol=1e-3, rtol=0)


def test_at_cfg_1_nothing_is_left_out(parts, draw):
    latents, rows = draw(sparse(parts.model, sparse_guidance.every(2)), cfg=1.0)
    assert rows == [ROWS] * 6
    assert torch.equal(latents, draw(parts.model, cfg=1.0)[0])


def test_outside_of_its_interval_guidance_costs_nothing(parts, draw):
    cfg, rows = draw(parts.model)
    assert rows == [2 * ROWS] * 6
    everywhere, rows = draw(sparse_guidance.limited_interval(parts.model, GuidanceRule(sigma_min=0.0, sigma_max=100.0)))
    assert rows == [2 * ROWS] * 6
    assert torch.equal(everywhere, cfg)
    middle, rows = draw(sparse_guidance.limited_interval(parts.model, GuidanceRule(sigma_min=0.3, sigma_max=0.9)))
    assert rows[0] == rows[-1] == ROWS
    assert 2 * ROWS in rows
    assert not torch.allclose(middle, cfg, atol=1e-3)


def test_adaptive_guidance_that_never_agrees_is_cfg(parts, draw):
    latents, rows = draw(sparse_guidance.adaptive(parts.model, 2.0))
    assert rows == [2 * ROWS] * 6
    assert torch.equal(latents, draw(parts.model)[0])


def test_adaptive_guidance_that_agrees_at_once_has_one_second_pass(parts, draw):
    assert draw(sparse_guidance.adaptive(parts.model, -2.0))[1] == [2 * ROWS] + [ROWS] * 5


def test_adaptive_guidance_drops_the_second_pass_picture_by_picture(parts, draw, monkeypatch):
    agrees = iter([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3])
    monkeypatch.setattr(torch, "cosine_similarity", lambda a, b: torch.tensor(next(agrees)))
    negative = encode(parts.clip, ["a red shape", "a star", "a blue shape"])
    latents, rows = draw(sparse_guidance.adaptive(parts.model, 0.5), negative=negative)
    # The prompt's rows and, apart from them, those that still have a second pass.
    assert rows == [6, 3, 2, 3, 2, 3, 1, 3, 1, 3, 1]
    guided = draw(parts.model, negative=negative)[0]
    same = (latents - guided).abs().amax((1, 2, 3)) < 2e-3
    assert same.tolist() == [False, False, True]  # the last one kept its own negative prompt to the end


def test_a_stale_difference_is_that_of_the_last_step_that_evaluated_both():
    a, b, c = (torch.full((1, 1, 8, 8), value) for value in (1.0, 3.0, 10.0))
    history = [predicted(0, 4, a, b), predicted(1, 4, a, c, evaluated=False)]
    torch.testing.assert_close(same_difference(step(2, 4), c, history), torch.full_like(c, 12.0))


def test_of_a_reused_difference_first_the_low_then_the_high_frequencies_grow():
    low, high = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    high[..., ::2] = -1.0  # the fastest change that there is
    zero = torch.zeros_like(low)
    early, late = ([predicted(index, 20, zero, low + high)] for index in (6, 17))
    growth = sparse_guidance.GROWTH
    found = sparse_guidance.growing_difference(step(8, 20), zero, early)
    torch.testing.assert_close(found, growth**2 * low + high)
    found = sparse_guidance.growing_difference(step(19, 20), zero, late)
    torch.testing.assert_close(found, low + growth**2 * high)


def test_fitted_weights_find_the_sum_that_the_negative_is():
    torch.manual_seed(0)
    conds = [torch.randn(2, 1, 4, 4) for _ in range(3)]
    first = 0.5 * conds[0]
    second = 0.25 * conds[0] - conds[1] + 2 * first + 0.1 * torch.randn_like(first)  # no exact sum
    third = conds[2] - 0.5 * conds[0] + 0.25 * second
    history = [predicted(i, 4, c, u) for i, (c, u) in enumerate(zip(conds, (first, second, third), strict=True))]
    estimate = LinearEstimate(sparse_guidance.fit_weights(history))
    torch.testing.assert_close(estimate(step(0, 4), conds[0], []), first)
    torch.testing.assert_close(estimate(step(2, 4), conds[2], history[:2]), third, atol=1e-4, rtol=0)
    over = LinearEstimate(estimate.weights, until=0.5)
    assert torch.equal(over(step(2, 4), conds[2], history[:2]), conds[2])


def test_a_sampling_that_evaluates_everything_has_a_history_to_fit(parts, draw):
    guidance, model = SparseGuidance(sparse_guidance.always, no_guidance), parts.model.clone()
    model.set_model_sampler_calc_cond_batch_function(guidance)
    draw(model)
    weights = sparse_guidance.fit_weights(guidance.history)
    assert [len(each) for each in weights] == [1, 3, 5, 7, 9, 11]
    last = guidance.history[-1]
    found = LinearEstimate(weights)(last.step, last.cond, guidance.history[:-1])
    assert (found - last.uncond).norm() < 0.9 * (last.cond - last.uncond).norm()


def test_spectrum_that_is_warming_up_is_the_model_itself(parts, draw):
    latents, rows = draw(spectrum(parts.model, SpectrumSettings(warm_up=6)))
    assert rows == [2 * ROWS] * 6
    assert torch.equal(latents, draw(parts.model)[0])


@pytest.mark.parametrize(
    ("settings", "steps", "evaluated"),
    [
        # Every second one, and once the window has grown to three every third.
        (SpectrumSettings(warm_up=2, window=2.0, flex=0.5, last=1), 10, {0, 1, 3, 5, 8, 9}),
        (SpectrumSettings(warm_up=3, window=1.0, flex=0.0, last=0), 6, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_spectrum_evaluates_whole_steps_in_a_growing_window(parts, draw, settings, steps, evaluated):
    assert draw(spectrum(parts.model, settings), steps)[1] == [2 * ROWS] * len(evaluated)
    own = step_caches.Spectrum(settings)
    own.window = settings.window
    found = set()
    for index in range(steps):
        if own._is_evaluated(step(index, steps)):
            found.add(index)
            own.forecast = 0
        else:
            own.forecast += 1
    assert found == evaluated


def test_spectrum_forecasts_a_polynomial_and_a_straight_line():
    index, count = torch.arange(8.0), 10
    cubic = ((index / count) ** 3).reshape(8, 1, 1, 1, 1)
    known = [(i, cubic[i]) for i in range(7)]
    exact = SpectrumSettings(weight=1.0, degree=3, ridge=1e-6)
    torch.testing.assert_close(step_caches.forecast(exact, known, 7, count), cubic[7], atol=1e-3, rtol=0)
    line = SpectrumSettings(weight=0.0)
    torch.testing.assert_close(step_caches.forecast(line, known, 8, count), 3 * cubic[6] - 2 * cubic[5])
    assert torch.equal(step_caches.forecast(line, known[:1], 3, count), cubic[0])


def test_chebyshev_polynomials():
    tau = torch.linspace(-1, 1, 7)
    expected = torch.stack([torch.ones(7), tau, 2 * tau**2 - 1, 4 * tau**3 - 3 * tau], 1)
    torch.testing.assert_close(step_caches.chebyshev(tau, 3), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", [step_caches.easy_cache, step_caches.lazy_cache])
def test_comfyuis_caches_leave_out_whole_steps_and_at_threshold_0_nothing(parts, draw, cache):
    latents, rows = draw(cache(parts.model, 0.0), 12)
    assert rows == [2 * ROWS] * 12
    assert torch.equal(latents, draw(parts.model, 12)[0])
    assert sum(draw(cache(parts.model, 0.5), 12)[1]) < 2 * ROWS * 12


def test_comfyuis_easy_cache_is_only_measured_where_it_has_an_effect(tmp_path):
    flow = Toy.load("toy-dit")
    assert drawn(flow, step_caches.easy_cache(flow.model, 3.0), 12)[1] == [2 * ROWS] * 12
    with pytest.raises(SystemExit, match="On toy-dit easy_cache has no effect: it is for a UNet"):
        frontier.main(["--base", "toy-dit", "--quick", "--only", "cfg", "easy_cache", "--work", str(tmp_path)])


def row(method: str, group: Group, evaluations: float, distance: float) -> dict:
    own = {"method": method, "group": group.value, "setting": f"{evaluations:g} steps", "distance_to_cfg": distance}
    return own | {"evaluations": evaluations, "distance_to_cfg_se": 0.01}


def test_the_frontier_is_what_nothing_cheaper_is_nearer_than():
    rows = [row("cfg", Group.CFG, *each) for each in ((6, 0.9), (10, 0.6), (10, 0.7), (20, 0.2), (24, 0.25))]
    best = frontier_report.non_dominated(rows)
    assert [(each["evaluations"], each["distance_to_cfg"]) for each in best] == [(6, 0.9), (10, 0.6), (20, 0.2)]


def test_at_equal_distance_the_fewest_evaluations_count():
    rows = [row("cfg", Group.CFG, *each) for each in ((6, 0.9), (10, 0.3), (20, 0.3), (24, 0.2))]
    assert frontier_report.fewest(rows, 0.3)["evaluations"] == 10
    assert frontier_report.fewest(rows, 0.1) is None


def test_the_harder_regime_is_where_half_the_steps_are_furthest_off_and_cfg_still_good():
    def candidate(name: str, halved: float, accuracy: float, steps: float = 0.1, omega: float = 3.0) -> dict:
        distances = {"distance_to_cfg_20": steps, "distance_to_cfg_10": halved}
        return {"regime": name, "settings": {"omega": omega}, "prompt_accuracy": accuracy, **distances}

    rows = [candidate("a", 0.2, 1.0), candidate("b", 0.5, 0.95), candidate("inaccurate", 0.9, 0.4)]
    rows += [candidate("far", 1.5, 1.0, steps=0.6), candidate("not trained for", 0.8, 1.0, omega=8.0)]
    assert frontier.harder(rows, highest_omega=6.0)["regime"] == "b"


def test_settings_of_a_method_have_files_of_their_own():
    for name, method in FRONTIER.items():
        titles = [setting.title for setting in method.settings]
        assert len(set(titles)) == len(titles), name


@pytest.mark.slow
def test_one_command_makes_the_tables_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("comfyui_agd.examples.toy.scoring.REFERENCE_IMAGES", 256)
    how = [
        "--quick",
        "--base",
        "toy",
        "--pictures",
        "4",
        "--work",
        str(tmp_path / "work"),
        "--trained",
        str(tmp_path / "trained"),
    ]
    how += ["--results", str(tmp_path / "results"), "--json", str(tmp_path / "rows.json")]
    frontier.main([*how, "--only", "cfg", "stale_difference"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["regime"] for row in rows} == {"usual", "harder"}
    usual = {(row["method"], row["setting"]): row for row in rows if row["regime"] == "usual"}
    assert usual["cfg", "10 steps"]["evaluations"] == 20
    assert usual["stale_difference", "20 steps, k = 2"]["evaluations"] == 30
    distances = [usual["cfg", f"{steps} steps"]["distance_to_cfg"] for steps in (4, 10, 30)]
    assert distances == sorted(distances, reverse=True)
    page = (tmp_path / "results" / "frontier.md").read_text()
    assert all(part in page for part in ("| `cfg` | 10 steps |", "## The usual regime", "## The harder regime"))
    assert Image.open(tmp_path / "results" / "frontier-usual.png").width > 1000

    # Again, with one more method: what was there is neither sampled anew nor lost.
    sampled = []

    def watched(parts, model, prompts, settings, **batches):
        sampled.append(settings.steps)
        return sample(parts, model, prompts, settings, **batches)

    monkeypatch.setattr(experiment, "sample", watched)
    frontier.main([*how, "--regime", "usual", "--only", "cfg", "every_other"])
    assert sorted(sampled) == [10, 20, 20]
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(rows) + 3


def test_an_unknown_method_is_an_error_that_says_where_to_look(tmp_path):
    with pytest.raises(SystemExit, match="There is no method nonsense; --list says which there are"):
        frontier.main(["--only", "nonsense", "--work", str(tmp_path)])

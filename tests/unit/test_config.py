"""Training settings: what they refuse, the sizes they mean, which of them make a run another one."""

import math
from dataclasses import asdict, fields, replace

import pytest
import torch

from comfyui_agd.agd_core.guidance import GuidanceRule
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.pool import draw_omega
from comfyui_agd.training.run_identity import DifferentRun, check_same_run


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": 0}, "iterations is 0, but must be from 1 to 1000000"),
        ({"omega_min": 5.0, "omega_max": 2.0}, r"the guidance scale goes from 5.0 \(omega_min\) to 2.0 \(omega_max\)"),
        (
            {"omega_min": 0.5, "omega_max": 1.0},
            r"must rise from above 0 to above 1",
        ),
        ({"steps_min": 9, "steps_max": 3}, "steps_max is 3, less than steps_min, 9"),
        ({"loss": "mae"}, "loss is 'mae', but must be one of balanced, plain"),
        ({"ema": 1.5}, "ema is 1.5, but must be from 0 to 1"),
        ({"on_policy": -0.1}, "on_policy is -0.1, but must be from 0 to 1"),
        ({"patience": -1}, "patience is -1, but must be from 0 to"),
        ({"keep_states": 0}, "keep_states is 0, but must be from 1 to"),
        ({"frames": 0}, "frames is 0, but must be from 1 to"),
        ({"schedulers": ()}, "schedulers is empty"),
        ({"solvers": ()}, "solvers is empty"),
        ({"solvers": ("euler", "heun")}, "solvers is 'heun', but must be one of euler, euler_ancestral, dpm"),
        ({"aspect_ratios": ("1:1", "wide")}, "aspect ratio 'wide' is not like 3:2"),
        ({"teacher": "pag"}, "teacher is 'pag', but must be one of cfg, interval, rescale, apg, cfg_zero"),
        ({"interval_sigma_min": 6.0}, "interval of guidance goes from noise level 6.0 to 5.42, but must rise"),
        ({"interval_sigma_min": -1.0}, "interval_sigma_min is -1.0, but must be from 0 to"),
        ({"rescale_phi": 1.5}, "rescale_phi is 1.5, but must be from 0 to 1"),
        ({"apg_eta": -0.5}, "apg_eta is -0.5, but must be from 0 to 1"),
        ({"apg_threshold": -1.0}, "apg_threshold is -1.0, but must be from 0 to"),
        ({"apg_threshold": float("nan")}, "apg_threshold is nan, but must be from 0 to"),
        ({"batch": 0, "reuse": 0}, "batch is 0, but must be from 1 to 4096; reuse is 0, but must be from 1 to 1000"),
    ],
)
def test_settings_that_cannot_work_say_why(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)


def test_the_rule_has_the_settings_of_its_teacher():
    config = TrainConfig(
        teacher="apg",
        interval_sigma_min=0.1,
        interval_sigma_max=2.0,
        rescale_phi=0.5,
        apg_eta=0.2,
        apg_threshold=7.0,
    )
    assert config.rule == GuidanceRule("apg", sigma_min=0.1, sigma_max=2.0, phi=0.5, eta=0.2, threshold=7.0)
    assert TrainConfig(apg_threshold=0.0).rule.threshold == math.inf
    assert TrainConfig().rule == GuidanceRule()


def test_aspect_ratios_keep_the_area_and_the_units_of_the_base():
    ratios = ("1:1", "3:2", "2:3", "16:9")
    buckets = TrainConfig(width=1024, height=1024, aspect_ratios=ratios).buckets()
    assert buckets[0] == (1024, 1024)
    assert buckets[1] == buckets[2][::-1]
    for (width, height), ratio in zip(buckets, ratios, strict=True):
        across, down = map(int, ratio.split(":"))
        assert width % 64 == height % 64 == 0
        assert width * height == pytest.approx(1024**2, rel=0.06)
        assert width / height == pytest.approx(across / down, rel=0.06)


def test_without_aspect_ratios_there_is_one_size():
    assert TrainConfig(width=640, height=448).buckets() == [(640, 448)]


def test_ratios_that_round_to_one_size_are_one_bucket():
    assert TrainConfig(width=64, height=64, aspect_ratios=("1:1", "33:32")).buckets() == [(64, 64)]


def test_what_only_says_how_a_run_is_kept_or_fits_may_change_between_sessions():
    free = {f.name for f in fields(TrainConfig) if not f.metadata["result"]}
    kept = {"save_every", "keep_states", "preview_every"}
    assert free == kept | {"checkpointing", "micro_batch", "memory"}
    config = TrainConfig()
    assert replace(config, save_every=1, micro_batch=2).result_settings() == config.result_settings()
    assert replace(config, evaluate_every=1).result_settings() != config.result_settings()


@pytest.mark.parametrize(("sampling", "below_half"), [("log_uniform", 0.72), ("uniform", 0.45)])
def test_omega_is_drawn_from_all_of_its_range(sampling, below_half):
    """Log-uniform draws have as many from 1 to sqrt(12) as above it, so most of them below 6."""
    config, generator = TrainConfig(omega_sampling=sampling), torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_omega(config, generator) for _ in range(2000)])
    assert 1 <= drawn.min() < 1.1
    assert 11 < drawn.max() <= 12
    assert (drawn < 6).float().mean().item() == pytest.approx(below_half, abs=0.04)


def all_settings(**chosen) -> dict:
    """What versions kept of a run before kinds had their own settings."""
    settings = asdict(TrainConfig(**chosen))
    decides = {f.name for f in fields(TrainConfig) if f.metadata["result"]}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items() if key in decides}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_before_kinds_had_their_own_settings_goes_on(kind):
    now = TrainConfig(kind=kind, hidden=16, rank=16 if kind == "low_rank" else 4).result_settings()
    then = {"version": 3, "identity": all_settings(kind=kind, hidden=16, rank=4)}
    check_same_run(then, now, "a.run")
    del then["identity"]["frames"]  # which there once was not
    check_same_run(then, now, "a.run")
    with pytest.raises(DifferentRun, match="batch: 8 then, 4 now"):
        check_same_run({"version": 3, "identity": all_settings(kind=kind, hidden=16, rank=4, batch=8)}, now, "a.run")


def test_what_is_kept_of_a_run_are_its_own_kinds_settings():
    assert {"hidden", "shared_encoder"}.isdisjoint(TrainConfig(kind="low_rank").own_settings())
    assert {"rank", "hidden", "vector"}.isdisjoint(TrainConfig(kind="scale").result_settings())
    assert TrainConfig(kind="low_rank", hidden=7).result_settings() == TrainConfig(kind="low_rank").result_settings()

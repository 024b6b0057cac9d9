"""Settings that suit a base's family."""

from dataclasses import replace

import pytest

from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.presets import settings_for


@pytest.mark.parametrize(
    ("family", "size"), [("SD15", 512), ("SD15_instructpix2pix", 512), ("SD20", 768), ("SDXL", 1024), ("Unheard", 512)]
)
def test_pictures_have_the_size_that_the_family_was_made_for(base, family, size):
    config = settings_for(replace(base, family=family), {})
    assert (config.width, config.height) == (size, size)


def test_sdxl_is_trained_at_many_ratios_of_one_area(base):
    buckets = settings_for(replace(base, family="SDXL"), {}).buckets()
    assert len(buckets) == 7
    assert all(width % 64 == height % 64 == 0 for width, height in buckets)
    assert all(0.9 < width * height / 1024**2 < 1.1 for width, height in buckets)


def test_what_is_chosen_stays(base):
    config = settings_for(replace(base, family="SDXL"), {"width": 768, "height": 512, "iterations": 3})
    assert config.buckets() == [(768, 512)]
    assert config.iterations == 3
    assert config.hidden == TrainConfig.hidden


def test_flow_matching_is_trained_along_its_own_schedules_and_samplers(base):
    config = settings_for(replace(base, prediction="FLOW"), {})
    assert config.solvers == ("euler", "dpmpp_2m")
    assert config.schedulers == ("simple", "normal")


def test_a_transformers_adapter_is_delta_where_attentions_are_reached_or_else_low_rank(base):
    transformer = replace(base, layout="transformer", vector=64)
    config = settings_for(transformer, {})
    assert (config.kind, config.rank, config.vector) == ("delta", 16, 128)
    layers = tuple(replace(layer, reads_prompt=False) for layer in base.layers)
    config = settings_for(replace(transformer, layers=layers, vector=0), {})
    assert (config.kind, config.kind_config().rank, config.vector) == ("low_rank", 16, 0)
    assert settings_for(transformer, {"kind": "low_rank"}).kind_config().rank == 16
    assert settings_for(transformer, {"kind": "scale"}).kind == "scale"

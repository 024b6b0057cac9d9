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

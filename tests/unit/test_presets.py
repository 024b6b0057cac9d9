"""Settings that suit a base's family."""

import re
from dataclasses import asdict, fields, replace

import pytest

from comfyui_agd.agd_core.families import FAMILIES
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.training.config import TrainConfig, settings_of_kind
from comfyui_agd.training.options import SettingsError
from comfyui_agd.training.presets import check_chosen, defaults_of, settings_for

OF_KINDS = {name for kind in KINDS for name in settings_of_kind(kind)}
FOREIGN = [(kind, name) for kind in KINDS for name in sorted(OF_KINDS - set(settings_of_kind(kind)))]


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


def test_low_rank_has_its_own_rank_on_every_base(base):
    assert settings_for(base, {"kind": "low_rank"}).kind_config().rank == 16
    assert settings_for(base, {"kind": "low_rank", "rank": 3}).kind_config().rank == 3


@pytest.mark.parametrize(("kind", "name"), FOREIGN)
def test_a_setting_that_a_kind_does_not_have_is_refused_by_name(base, kind, name):
    given, own = {"kind": kind, name: getattr(TrainConfig, name)}, ", ".join(settings_of_kind(kind))
    for use in (check_chosen, lambda given: settings_for(base, given)):
        with pytest.raises(SettingsError, match=rf"An adapter of kind {kind} has no {name}: .* It has {own}\."):
            use(given)


@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_of_a_kind_are_taken(base, kind):
    own = {name: getattr(TrainConfig, name) for name in settings_of_kind(kind)}
    assert asdict(settings_for(base, {"kind": kind, **own}).kind_config()) == own


def test_a_setting_is_refused_too_where_the_base_decides_the_kind(base):
    layers = tuple(replace(layer, reads_prompt=False) for layer in base.layers)
    unreached = replace(base, layout="transformer", layers=layers)
    with pytest.raises(SettingsError, match="kind low_rank has no hidden"):
        settings_for(unreached, {"hidden": 8})


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_help_tells_the_defaults_that_a_run_will_have(base, family, kind):
    of = replace(base, family=family.name, layout=family.layout, vector=64)
    for prediction in ("EPS", "FLOW"):
        config = settings_for(replace(of, prediction=prediction), {"kind": kind} if kind else {})
        for f in fields(TrainConfig):
            if f.name not in ("width", "height", "kind"):
                value = getattr(config, f.name)
                shown = " ".join(value) or "none" if isinstance(value, tuple) else f"{value}"
                assert re.search(rf"(^|: |, or ){re.escape(shown)}([;,]|$)", defaults_of(f.name)), f.name


def test_help_tells_the_sizes_by_family():
    sides = [family.side for family in FAMILIES]
    assert defaults_of("width") == f"by the base's family: {min(sides)} to {max(sides)}"

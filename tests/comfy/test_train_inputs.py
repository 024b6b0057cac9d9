"""AGD Train Settings: its fields show what a run has without it, and what is chosen there reaches the run."""

from dataclasses import asdict, replace

import pytest

from comfyui_agd.agd_core.comfyui import folders
from comfyui_agd.agd_core.config import BaseInfo
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.nodes.train import _prepared
from comfyui_agd.nodes.train_settings import AGDTrainSettings, TrainSettings
from comfyui_agd.tests.support.small import TIME_CHANNELS, small_layers
from comfyui_agd.training.config import settings_of_kind
from comfyui_agd.training.options import SettingsError
from comfyui_agd.training.presets import COMMON_RATIOS, settings_for


@pytest.fixture
def sdxl() -> BaseInfo:
    return BaseInfo("SDXL", "EPS", small_layers(), {"model_channels": 24, "time_channels": TIME_CHANNELS}, "abc")


@pytest.fixture
def inputs():
    folders.register()
    return {each.id: each for each in AGDTrainSettings.define_schema().inputs}


def shown(inputs: dict, **choices: str) -> dict:
    """What the node's `execute` gets with its defaults, and those choices of the inputs that unfold."""
    given = {}
    for name, each in inputs.items():
        if hasattr(each, "options") and hasattr(each.options[0], "key"):
            option = next(o for o in each.options if o.key == choices.get(name, each.options[0].key))
            given[name] = {name: option.key} | {field.id: field.default for field in option.inputs}
        elif name != "other_expert":
            given[name] = each.default
    return given


def settings(given: dict) -> TrainSettings:
    return AGDTrainSettings.execute(**given).result[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fields_show_what_a_run_has_without_them(inputs, sdxl, kind):
    found = settings(shown(inputs, kind=kind))
    without = settings_for(sdxl, {"kind": kind, "preview_every": 250})
    assert asdict(settings_for(sdxl, found.chosen)) == asdict(without)


def test_without_choices_the_rest_is_as_without_the_node(inputs):
    assert replace(settings(shown(inputs)), chosen={}) == TrainSettings()


def test_the_default_kind_comes_first(inputs):
    assert inputs["kind"].options[0].key == "delta"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_fields_for_its_own_settings_only(inputs, kind):
    option = next(o for o in inputs["kind"].options if o.key == kind)
    sizes = {"adapter_size": "hidden", "rank": "rank"}
    fields = {sizes[field.id] for field in option.inputs if field.id in sizes}
    assert fields == {"hidden", "rank"} & set(settings_of_kind(kind))


def test_what_is_chosen_reaches_the_run(inputs):
    given = shown(inputs, length="this many iterations", picture_size="width and height", noise_levels="low noise")
    given["length"]["iterations"] = 7
    given["kind"]["adapter_size"] = 16
    given["picture_size"] |= {"width": 512, "height": 768}
    chosen = settings(given | {"guidance_scale_up_to": 9.0, "start": "mine.safetensors"})
    expected = {"iterations": 7, "hidden": 16, "width": 512, "height": 768, "aspect_ratios": COMMON_RATIOS}
    expected |= {"omega_max": 9.0, "sigma_to": 0.875}
    assert {name: chosen.chosen.get(name) for name in expected} == expected
    assert chosen.start == "mine.safetensors"


def test_an_other_expert_without_noise_levels_of_its_own_is_refused(inputs):
    chosen = settings(shown(inputs) | {"other_expert": object()})
    with pytest.raises(SettingsError, match="There is an other expert, but the model is trained at all noise levels"):
        _prepared(None, None, None, chosen, "normal", 0.0)


def test_one_size_can_be_chosen(inputs, sdxl):
    given = shown(inputs, picture_size="width and height")
    given["picture_size"]["aspect_ratios"] = False
    assert settings_for(sdxl, settings(given).chosen).buckets() == [(1024, 1024)]


def test_a_chosen_number_of_iterations_wins_over_quality(sdxl):
    lengths = {quality: settings_for(sdxl, {}, quality).iterations for quality in ("quick", "normal", "best")}
    assert lengths == {"quick": 500, "normal": 1500, "best": 4500}
    assert settings_for(sdxl, {"iterations": 7}, "best").iterations == 7
    assert settings_for(sdxl, {"kind": "scale"}, "quick").iterations == 50


def test_a_quality_that_is_none_is_refused_by_name(sdxl):
    with pytest.raises(SettingsError, match="quality is 'perfect', but must be one of quick, normal, best"):
        settings_for(sdxl, {}, "perfect")

"""AGD Train's inputs: what 'auto' is, and what stood for it in workflows of before."""

import math

import pytest

from comfyui_agd.agd_core.comfyui import folders
from comfyui_agd.nodes import train
from comfyui_agd.nodes.train import AGDTrain
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.options import SettingsError

EARLIER = {"iterations": 0, "batch": 0, "width": 0, "height": 0, "learning_rate": 0.0, "hidden": 128, "reuse": 0,
           "rank": 4}  # fmt: skip


@pytest.mark.parametrize("text", ["auto", "Auto ", ""])
def test_auto_is_left_to_what_suits_the_model(text):
    assert train._chosen(dict.fromkeys(EARLIER, text) | {"kind": "auto"}) == {}


def test_a_workflow_of_before_there_was_the_word_means_what_it_meant():
    assert train._chosen(EARLIER) == {}
    given = {"iterations": 40, "batch": 8, "width": 64, "height": 64, "learning_rate": 2e-3, "hidden": 32, "reuse": 2}
    assert train._chosen({**given, "rank": 0}) == {**given, "rank": 0}


@pytest.mark.parametrize("name", EARLIER)
def test_a_number_may_be_typed(name):
    chosen = train._chosen({name: "1"})
    assert chosen == {name: 1}
    assert type(chosen[name]) is type(getattr(TrainConfig, name))


def test_what_once_stood_for_auto_can_be_typed():
    assert train._chosen({"hidden": "128", "rank": "4"}) == {"hidden": 128, "rank": 4}
    assert train._chosen({"iterations": "0", "rank": "0"}) == {"rank": 0}


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("text", ["many", "1,5", "\x1b[2J"])
def test_a_text_that_is_no_number_is_refused_by_name(name, text):
    with pytest.raises(SettingsError, match=f"{name} is .*, but must be a number or 'auto'"):
        train._chosen({name: text})


@pytest.mark.parametrize("text", ["inf", "nan", "1e400", "-1"])
def test_a_number_that_can_be_none_reaches_the_check_of_the_settings(text):
    number = train._chosen({"learning_rate": text})["learning_rate"]
    assert not math.isfinite(number) or number < 0
    with pytest.raises(SettingsError, match=r"learning_rate is .*, but must be from"):
        TrainConfig(learning_rate=number)


def test_the_fields_show_what_a_run_will_have():
    folders.register()
    for each in AGDTrain.define_schema().inputs:
        name, shown = each.id, each.as_dict()
        if name in EARLIER:
            assert shown["default"] == "auto"
            assert shown["widgetType"] == "STRING"
            assert set(each.get_io_type().split(",")) == {"STRING", "INT", "FLOAT"}  # numbers can be linked
        elif hasattr(TrainConfig, name) and name not in ("clip", "kind", "aspect_ratios"):
            assert shown["default"] == getattr(TrainConfig, name)

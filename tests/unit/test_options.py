"""Every number, choice and list that a command or node takes: what it may be, said by its name."""

import dataclasses
import math
import random
from dataclasses import fields, replace
from typing import get_args, get_origin

import pytest
import tomllib
import torch

from comfyui_agd.agd_core.seeds import LARGEST_SEED, seeded_generator
from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel
from comfyui_agd.training.arguments import ExportSettings, PromptSettings, RecordSettings
from comfyui_agd.training.assess import AssessConfig
from comfyui_agd.training.config import TrainConfig
from comfyui_agd.training.job import to_toml
from comfyui_agd.training.options import SettingsError
from comfyui_agd.training.trainer import train

VALID = {TrainConfig: {}, AssessConfig: {}, PromptSettings: {}, RecordSettings: {}, ExportSettings: {"omega": 3.0}}
EVERY = [(kind, f) for kind in VALID for f in fields(kind)]
NUMBERS = [(kind, f) for kind, f in EVERY if f.type in (int, float)]


def ids(value):
    return getattr(value, "name", getattr(value, "__name__", None))


def refused(kind, name: str, value) -> str:
    with pytest.raises(SettingsError) as error:
        kind(**{**VALID[kind], name: value})
    return str(error.value)


@pytest.mark.parametrize(("kind", "f"), NUMBERS, ids=ids)
def test_a_number_is_finite_and_within_limits(kind, f):
    low, high = f.metadata["limits"]
    beyond = [math.inf, -math.inf, math.nan, high * 2, 10**30, -(10**30), low - 1]
    for wrong in beyond if f.type is float else [10**30, -(10**30), high + 1, low - 1]:
        assert f"{f.name} is {wrong}, but must be from " in refused(kind, f.name, wrong)


@pytest.mark.parametrize(("kind", "f"), NUMBERS, ids=ids)
def test_a_number_is_no_bool_no_text_and_no_half(kind, f):
    wrong = {True: "true", None: "null", "4": "'4'", (4,): "(4,)"} | ({4.0: "4.0"} if f.type is int else {})
    for value, shown in wrong.items():
        assert f"{f.name} is {shown}, but must be a " in refused(kind, f.name, value)


@pytest.mark.parametrize(("kind", "f"), [(k, f) for k, f in EVERY if f.type in (str, bool)], ids=ids)
def test_a_choice_is_one_of_them_and_a_switch_is_on_or_off(kind, f):
    for value, shown in {1: "1", None: "null", "\x1b[2J": r"'\x1b[2J'"}.items():
        assert f"{f.name} is {shown}, but must be " in refused(kind, f.name, value)


@pytest.mark.parametrize(("kind", "f"), [(k, f) for k, f in EVERY if get_origin(f.type) is tuple], ids=ids)
def test_a_list_is_one_and_so_are_its_items(kind, f):
    name, wrong = f.metadata["called"] or f.name, "x" if get_args(f.type)[0] is float else 3
    assert f"{name} is 'one', but must be a list" in refused(kind, f.name, "one")
    assert f"{name} is {wrong!r}, but must be a " in refused(kind, f.name, (wrong,))


def test_every_wrong_value_is_told_at_once():
    with pytest.raises(SettingsError, match=r"batch is 0, .*; seed is -1, .*; kind is 'no', "):
        TrainConfig(batch=0, seed=-1, kind="no")


@pytest.mark.parametrize("ratio", ["1:9999", "99999999999:1", "9:1", "0:1", "1:1\n", "a"])
def test_a_ratio_that_no_picture_has_is_refused(ratio):
    with pytest.raises(SettingsError, match=r"aspect ratio .* is not like 3:2"):
        TrainConfig(aspect_ratios=("1:1", ratio))


def test_the_largest_seed_trains():
    trained = train(AnalyticModel(), PROMPTS, replace(CONFIG, iterations=2, held_out=1, seed=LARGEST_SEED))
    assert all(map(math.isfinite, trained.losses))


def test_a_seed_past_the_largest_counts_from_0_again():
    assert torch.equal(*(torch.randn(3, generator=seeded_generator(seed)) for seed in (5, 2**64 + 5)))


def random_text(rng: random.Random) -> str:
    ranges = [(0, 0x20), (0x20, 0x7F), (0x7F, 0xA0), (0xA0, 0xD800), (0xE000, 0x10FFFF)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(12))) + rng.choice("\\\"\n'#")


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_to_a_config_file_can_be_read_again(seed):
    rng = random.Random(seed)
    numbers = [rng.uniform(-1e9, 1e9), 10.0 ** rng.randrange(-300, 300), math.inf, -math.inf, 0.0, 1e16, 5e-4]
    values = [*numbers, rng.randrange(2**64), -3, True, False, [], *(random_text(rng) for _ in range(8))]
    values += [[random_text(rng) for _ in range(3)], numbers, "C:\\Users\\new\\table", "", "\x7f\x00\x1b\x85\u2028"]
    settings = {f"setting_{i}": value for i, value in enumerate(values)}
    assert tomllib.loads(to_toml(settings | {"none": None})) == settings


def test_what_no_config_file_can_hold_is_replaced():
    text = to_toml({"path": "a\ud800\udfffb", "nan": math.nan})
    read = tomllib.loads(text.encode().decode())
    assert read["path"] == "a\ufffd\ufffdb"
    assert math.isnan(read["nan"])


def test_every_setting_of_a_training_can_be_read_again():
    config = replace(CONFIG, seed=LARGEST_SEED, learning_rate=1e-30, aspect_ratios=("3:2",))
    read = tomllib.loads(to_toml(dataclasses.asdict(config)))
    assert TrainConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in read.items()}) == config

"""An adapter file comes from a stranger: whatever is in it, it is taken or refused with one clear error."""

import contextlib
import dataclasses
import json
import random

import pytest
from safetensors import safe_open

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.tests.support.damaged import damaged_bytes, damaged_description, with_description
from comfyui_agd.tests.support.older_files import BASE, as_format_2, write_format_1
from comfyui_agd.tests.support.small import config_for
from comfyui_agd.training.assess import learnt_by

TRAINING = {
    "iterations": 3,
    "gap_closed": {"2": 0.5, "7.5": 0.25},
    "gap_closed_se": {"2": 0.03, "7.5": 0.02},
    "direction_cosine": {"2": 0.5},
    "base_patches": {"patched_weights": 2, "loras": ["a.safetensors:0.5"]},
    "config": {"teacher": "interval", "interval_sigma_min": 0.5, "batch": 4, "solvers": ["euler"], "frames": 2},
}


@pytest.fixture
def write(tmp_path, info):
    """A file of a kind, in bytes, with its description."""

    def write(kind: str) -> tuple[bytes, str]:
        config = config_for(info.base.layers, kind, hidden=8, encoder_width=8, rank=2)
        described = dataclasses.replace(info, config=config, resolutions=((8, 12),), training=TRAINING)
        file = adapter_file.save(tmp_path / f"{kind}.safetensors", Adapter(config), described)
        with safe_open(str(file), framework="pt") as opened:
            return file.read_bytes(), opened.metadata()["agd"]

    return write


def use(path, base) -> None:
    """What all who read adapter files make of one."""
    info, weights = adapter_file.load_weights(path)
    assert adapter_file.describe(info, path)
    adapter_file.check_base(info, base, path)
    Adapter(info.config).load_state_dict(weights)
    with contextlib.suppress(ValueError):  # of settings that can't be together
        learnt_by(info)
    gaps = info.training.get("gap_closed", {})
    assert all(float(omega) > 0 and value <= 1 for omega, value in gaps.items())
    assert info.training.get("base_patches", {}).get("patched_weights", 0) >= 0


def taken_or_refused(path, base) -> bool:
    """Whether it was taken. Any other error than the one is the test's failure."""
    try:
        use(path, base)
    except AdapterFileError as error:
        text = str(error)
        assert len(text) < 3_000
        assert text.isprintable()
        return False
    return True


def count_taken(path, file: bytes, description: str, base, count: int = 400) -> int:
    """How many of so many damaged descriptions are taken: what is only shown may be anything."""
    rng, taken = random.Random(description), 0
    for _ in range(count):
        path.write_bytes(with_description(file, damaged_description(description, rng)))
        taken += taken_or_refused(path, base)
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_descriptions_are_taken_or_refused(tmp_path, base, write, kind):
    file, description = write(kind)
    assert 0 < count_taken(tmp_path / "damaged.safetensors", file, description, base) < 200


def test_damaged_descriptions_of_format_1_are_taken_or_refused(tmp_path):
    path = tmp_path / "damaged.safetensors"
    write_format_1(path, "delta")
    with safe_open(str(path), framework="pt") as opened:
        description = opened.metadata()["agd"]
    assert 0 < count_taken(path, path.read_bytes(), description, BASE) < 200


def test_damaged_descriptions_of_format_2_are_taken_or_refused(tmp_path, base, write):
    file, description = write("delta")
    assert 0 < count_taken(tmp_path / "damaged.safetensors", file, as_format_2(description), base) < 200


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_are_taken_or_refused(tmp_path, base, write, kind):
    file, rng, path = write(kind)[0], random.Random(f"bytes of {kind}"), tmp_path / "damaged.safetensors"
    for _ in range(200):
        path.write_bytes(damaged_bytes(file, rng))
        taken_or_refused(path, base)


def change(description: str, *place, to) -> str:
    data = json.loads(description)
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = to
    return json.dumps(data)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format_version",), True, "format_version is true, but must be a whole number"),
        (("format_version",), 0, "format_version is 0, but must be from 1 to inf"),
        (("format_version",), 1.5, "format_version is 1.5, but must be a whole number"),
        (("format_version",), None, "format_version is null, but must be a whole number"),
        (("config", "settings", "hidden"), True, r"config.settings.hidden is true, but must be a whole number"),
        (
            ("config", "settings", "hidden"),
            10**30,
            r"config.settings.hidden is 10+, but must be from 1 to 512",
        ),
        (("config", "settings", "hidden"), 10**400, r"config.settings.hidden is 10+\.\.\., but must be from 1"),
        (("config", "settings", "gain"), 1, r"config.settings.gain is 1, but must be true or false"),
        (("config", "settings", "gain"), False, r"delta's low-rank changes with neither modulated nor gain"),
        (("config", "kind"), ["delta"], r"config.kind is a list of 1, but must be a text"),
        (("config", "layers"), ["input_9_0"], r"the base has no layers \['input_9_0'\]"),
        (("config", "layers"), ["in.put_9"], r"config.layers\[0\] is 'in.put_9', but must be .* such as input_1_0"),
        (("config", "layers"), ["middle_0_0"] * 2, "two layers have the same name"),
        (("base", "layers", 1, "width"), 0, r"base.layers\[1\].width is 0, but must be from 1 to 1000000"),
        (
            ("base", "layers", 0, "linears", 2, 1),
            "a",
            r"base.layers\[0\].linears\[2\]\[1\] is 'a', but must be a whole",
        ),
        (("base", "layers", 0), [], r"base.layers\[0\] is a list of 0, but must be an object"),
        (("base", "family"), "\x1b[31mRed", r"base.family is '\\x1b\[31mRed', but must be a text .* can be seen"),
        (("base", "family"), "\ud800", r"base.family is '\\ud800', but must be a text"),
        (("base", "layout"), "resnet", "base.layout is 'resnet', but must be one of unet, transformer"),
        (
            ("base", "architecture", "time_channels"),
            "a",
            "architecture.time_channels is 'a', but must be a whole",
        ),
        (
            ("base", "architecture", "num_res_blocks"),
            [-1],
            r"num_res_blocks\[0\] is -1, but must be from 0 to 1000",
        ),
        (("unconditional",), "two\nlines", r"unconditional is 'two\\nlines', but must be"),
        (("omega_range",), [1], r"omega_range is a list of 1, but must be one of 2"),
        (("omega_range",), [1, float("nan")], r"omega_range\[1\] is nan, but must be from 1e-06"),
        (("omega_range",), [0, 12], r"omega_range\[0\] is 0, but must be from 1e-06 to 1000000"),
        (("resolutions",), [[8, -8]], r"resolutions\[0\]\[1\] is -8, but must be from 1 to"),
        (("training", "gap_closed"), {"0": 0.5}, r"a name in training.gap_closed,.'0' is '0', but must be .* number"),
        (("training", "gap_closed"), {"2": "most"}, r"training.gap_closed.2 is 'most', but must be a number"),
        (("training", "config", "teacher"), "me", r"training.config.teacher is 'me', but must be one of cfg"),
        (("training", "base_patches"), 3, r"training.base_patches is 3, but must be an object"),
        (("training", "\x1b"), 3, r"a name in .*training,.'\\x1b' is '\\x1b', but must be a text"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_found_and_expected(tmp_path, write, place, value, message):
    file, description = write("delta")
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(with_description(file, change(description, *place, to=value)))
    with pytest.raises(AdapterFileError, match=rf"what it says of itself is wrong: copy or train it again.*{message}"):
        adapter_file.load_weights(path)


def test_every_wrong_field_is_named(tmp_path, write):
    file, description = write("delta")
    wrong = change(change(description, "negative_mode", to=3), "base", "vector", to=-1)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(with_description(file, wrong))
    with pytest.raises(AdapterFileError, match=r"base.vector is -1, .*; its description.negative_mode is 3, "):
        adapter_file.load_weights(path)


def many_layers(description: str, count: int, linears: int) -> str:
    data = json.loads(description)
    layer = data["base"]["layers"][0]
    own = [[f"attn1.to_{i}", 24, 24, False] for i in range(linears)]
    data["base"]["layers"] = [{**layer, "name": f"input_{i}_0", "linears": own} for i in range(count)]
    data["config"]["layers"] = [each["name"] for each in data["base"]["layers"]]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            lambda text: many_layers(text, 10_000, 1),
            r"base.layers is a list of 10,000, but must be a list of 1 to 2000",
        ),
        (lambda text: many_layers(text, 50_000, 0), "description has .* characters, and at most 4,000,000 are read"),
        (lambda text: many_layers(text, 1_000, 20), "there are more than 10,000 linear layers"),
        (lambda text: '{"format_version": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        (
            lambda text: change(text, "training", to={"a": [[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]}),
            "nested too deeply",
        ),
        (lambda text: text[:-1], "delimiter"),
        (lambda text: "[3]", "its description is a list of 1, but must be an object"),
    ],
    ids=["layers", "description", "linears", "nesting", "nested training", "cut", "list"],
)
def test_size_is_bounded_before_anything_is_made(tmp_path, write, monkeypatch, text, message):
    """A stranger's file costs neither time nor memory: no adapter is made of what will be refused."""
    file, description = write("delta")
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(with_description(file, text(description)))
    monkeypatch.setattr(adapter_file, "Adapter", None)
    with pytest.raises(AdapterFileError, match=message):
        adapter_file.load_weights(path)


class NothingLoaded:
    """An open file of which no weight may be loaded."""

    def __init__(self, *args, **kwargs):
        self.file = safe_open(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *args):
        self.file.__exit__(*args)

    def __getattr__(self, name):
        assert name != "get_tensor"
        return getattr(self.file, name)


def test_weights_are_compared_before_they_are_loaded(tmp_path, write, monkeypatch):
    """A file may hold any amount of numbers."""
    file, description = write("delta")
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(with_description(file, change(description, "config", "settings", "hidden", to=12)))
    monkeypatch.setattr(adapter_file, "safe_open", NothingLoaded)
    with pytest.raises(AdapterFileError, match=r"does not hold the weights .* instead of \(12,"):
        adapter_file.load_weights(path)

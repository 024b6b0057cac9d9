"""The adapter file: what is written comes back, and every damaged or foreign file says what is wrong with it."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.agd_core.kinds import KINDS
from comfyui_agd.tests.support.small import config_for


@pytest.fixture
def file(tmp_path, adapter, info):
    return adapter_file.save(tmp_path / "adapter.safetensors", adapter, info)


def rewrite(file, change_state=lambda state: None, change_data=lambda data: None) -> None:
    with safe_open(str(file), framework="pt") as opened:
        state, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    data = json.loads(metadata["agd"])
    change_state(state)
    change_data(data)
    save_file(state, str(file), {**metadata, "agd": json.dumps(data)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("omega_embedding", ["log", "fourier"])
def test_round_trip(tmp_path, info, kind, omega_embedding):
    config = config_for(info.base.layers, kind, omega_embedding=omega_embedding)
    info = dataclasses.replace(info, config=config, resolutions=((8, 12),), training={"iterations": 3})
    torch.manual_seed(1)
    adapter = Adapter(config)
    file = adapter_file.save(tmp_path / "a.safetensors", adapter, info)
    torch.manual_seed(2)
    loaded_info, loaded = adapter_file.load(file)
    assert loaded_info == info
    expected = adapter.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_inspect_shows_what_matters(file, info):
    text = adapter_file.describe(adapter_file.read_info(file), file)
    for part in ("Small (EPS-prediction, 2 cross-attentions", "delta, hidden 8", "1 to 12", "empty prompt"):
        assert part in text


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize(
    ("settings", "shown"),
    [({"kind": "low_rank", "rank": 5}, "low_rank"), ({"hidden": 8, "rank": 5}, "delta, hidden 8")],
)
def test_inspect_shows_the_rank(info, settings, shown, modulated):
    config = config_for(info.base.layers, modulated=modulated, **settings)
    text = adapter_file.describe(dataclasses.replace(info, config=config), "a.safetensors")
    assert f"{shown}, rank 5{', modulated' if modulated else ''}, {Adapter(config).parameter_count():,} " in text


def test_other_tools_find_modelspec_fields(file):
    with safe_open(str(file), framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.architecture"] == "small/agd-adapter"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.title"] == "adapter"


def test_a_loaded_adapter_does_not_keep_its_file_mapped(file):
    """Windows replaces no mapped file: a training could not take the place of the adapter that it began from."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells which files are mapped")
    loaded = adapter_file.load_weights(file)
    assert str(file) not in maps.read_text()
    assert loaded[1]


def test_missing_file(tmp_path):
    with pytest.raises(AdapterFileError, match=r"There is no adapter file .*gone.safetensors"):
        adapter_file.load(tmp_path / "gone.safetensors")


def test_corrupted_file(file):
    file.write_bytes(b"not a tensor in sight")
    with pytest.raises(AdapterFileError, match=r"21 bytes\) is not a readable safetensors file"):
        adapter_file.load(file)


def test_truncated_file(file):
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterFileError, match="damaged or incomplete"):
        adapter_file.load(file)


def test_foreign_file(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"lora_up.weight": torch.zeros(2)}, str(file), {"ss_network_dim": "4"})
    with pytest.raises(AdapterFileError, match=r"no AGD adapter.*found: ss_network_dim"):
        adapter_file.load(file)


def test_newer_format(file):
    rewrite(file, change_data=lambda data: data.update(format_version=99))
    with pytest.raises(AdapterFileError, match=r"newer AGD: update the node pack.*format 99.*reads up to 4"):
        adapter_file.load(file)


def test_damaged_description(file):
    rewrite(file, change_data=lambda data: data["config"]["settings"].pop("hidden"))
    with pytest.raises(AdapterFileError, match=r"missing fields \['hidden'\]"):
        adapter_file.load(file)


def test_every_offending_key_is_named(file):
    def damage(state):
        del state["encoders.0.omega.0.bias"]
        state["stranger"] = torch.zeros(1)
        state["kind.down.middle_0_0.bias"] = torch.zeros(5)
        state["kind.from_h.input_1_0.weight"] = state["kind.from_h.input_1_0.weight"].to(torch.float8_e4m3fn)

    rewrite(file, damage)
    with pytest.raises(AdapterFileError) as error:
        adapter_file.load(file)
    for part in (
        "encoders.0.omega.0.bias: missing",
        "stranger: unknown",
        "kind.down.middle_0_0.bias: shape (5,) instead of (8,)",
        "kind.from_h.input_1_0.weight: F8_E4M3 numbers instead of F32, F16, BF16",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(file, value):
    rewrite(file, lambda state: state["kind.down.input_1_0.bias"].fill_(value))
    with pytest.raises(AdapterFileError, match=r"own description asks for: kind.down.input_1_0.bias: holds NaN"):
        adapter_file.load(file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken(file, adapter, dtype):
    rewrite(file, lambda state: state.update({key: value.to(dtype) for key, value in state.items()}))
    loaded = adapter_file.load(file)[1].state_dict()
    assert all(torch.equal(value.to(dtype), loaded[key].to(dtype)) for key, value in adapter.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "yours", "sentence"),
    [
        (("SD15", "EPS"), ("SDXL", "EPS"), "This adapter is for SD 1.5, your checkpoint is SDXL."),
        (("SDXL", "EPS"), ("SDXLRefiner", "EPS"), "This adapter is for SDXL, your checkpoint is SDXL Refiner."),
        (
            ("SDXL", "EPS"),
            ("SDXL", "V_PREDICTION"),
            "This adapter is for SDXL with eps-prediction, your checkpoint is SDXL with v-prediction.",
        ),
        (
            ("SD15", "EPS"),
            ("SD20", "V_PREDICTION"),
            "This adapter is for SD 1.5 with eps-prediction, your checkpoint is SD 2 with v-prediction.",
        ),
        (("SDXL", "EPS"), ("SDXL", "EPS"), "This adapter is for SDXL, your checkpoint is SDXL with other layers."),
        (("Heard", "EPS"), ("Unheard", "EPS"), "This adapter is for Heard, your checkpoint is Unheard."),
    ],
)
def test_another_base_is_refused_in_the_users_words_first(info, base, theirs, yours, sentence):
    mine = dataclasses.replace(info, base=dataclasses.replace(base, family=theirs[0], prediction=theirs[1]))
    layers = (base.layers[0], dataclasses.replace(base.layers[1], width=64))
    other = dataclasses.replace(base, family=yours[0], prediction=yours[1], layers=layers)
    with pytest.raises(AdapterFileError) as refused:
        adapter_file.check_base(mine, other, "a.safetensors")
    what, remedy, details = re.fullmatch(r"(.+?\.) (Choose .+?\.) (Details: .+)", str(refused.value)).groups()
    assert what == sentence
    assert "train one with AGD Train, or choose 'training-free' in AGD Adapter Loader" in remedy
    both = f"a.safetensors was made for {mine.base.describe()}, but this model is {other.describe()}."
    assert details == f"Details: the adapter {both} Layers that differ: middle_0_0."


def test_another_prediction_alone_is_refused(info, base):
    with pytest.raises(AdapterFileError, match=r"EPS-prediction.*V_PREDICTION-prediction.*\)\.$"):
        adapter_file.check_base(info, dataclasses.replace(base, prediction="V_PREDICTION"), "a.safetensors")


def test_a_sibling_with_other_weights_is_taken(info, base):
    adapter_file.check_base(info, dataclasses.replace(base, fingerprint="other"), "a.safetensors")


def test_a_failed_save_leaves_the_old_file(file, adapter, info, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(adapter_file, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(AdapterFileError, match=r"could not be saved: .* \(disk full\): it takes .* make room"):
        adapter_file.save(file, adapter, info)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]

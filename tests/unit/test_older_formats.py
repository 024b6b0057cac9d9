"""Adapter files of older formats: loaded as what they are, under the names of today."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.adapter_file import AdapterFileError
from comfyui_agd.tests.support.older_files import BASE, as_format_2, write_format_1
from comfyui_agd.tests.support.small import config_for, randomised


@pytest.fixture
def write(tmp_path):
    """A function: a file of format 1 with these changes of its config, and the adapter that is in it."""

    def of(kind: str, **changes):
        file = tmp_path / f"{kind}.safetensors"
        return file, write_format_1(file, kind, **changes)

    return of


@pytest.mark.parametrize("kind", ["cross_attention", "offset", "delta", "low_rank", "scale"])  # that there were
def test_a_file_of_each_kind_loads_as_the_adapter_that_it_is(write, kind):
    file, adapter = write(kind, rank=3 if kind == "delta" else 0)
    info, loaded = adapter_file.load(file)
    assert (info.config, info.base) == (adapter.config, BASE)
    assert [layer.linears for layer in info.base.layers] == [layer.linears for layer in BASE.layers]
    expected = adapter.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_the_patches_of_its_base_have_their_name_of_today(write):
    info = adapter_file.read_info(write("delta")[0])
    assert info.training == {"iterations": 3, "base_patches": {"patched_weights": 2}, "config": {"teacher": "cfg"}}


def test_saved_again_it_is_a_file_of_today(write, tmp_path):
    info, adapter = adapter_file.load(write("delta")[0])
    again, loaded = adapter_file.load(adapter_file.save(tmp_path / "again.safetensors", adapter, info))
    assert again == info
    assert all(torch.equal(v, loaded.state_dict()[key]) for key, v in adapter.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lora"}, "kind is 'lora', but must be one of delta"),
        ({"modulated": None, "more": 1}, r"unknown fields \['more'\]"),
        ({"sites": None}, r"it is no description of format 1 \(TypeError"),
    ],
)
def test_a_damaged_description_says_so(write, changes, message):
    file, _ = write("delta")
    with adapter_file._open(file) as opened:
        data = json.loads(opened.metadata()["agd"])
    data["config"] |= changes
    save_file({}, str(file), {"agd": json.dumps(data)})
    with pytest.raises(AdapterFileError, match=rf"what it says of itself is wrong: .*{message}"):
        adapter_file.load(file)


def test_format_2_knew_no_vector_of_the_timestep(tmp_path):
    config = config_for(BASE.layers, hidden=8, encoder_width=8, rank=2)
    adapter = randomised(Adapter(config))
    info = adapter_file.AdapterInfo(config=config, base=BASE, omega_range=(1.0, 12.0))
    file = adapter_file.save(tmp_path / "new.safetensors", adapter, info)
    with safe_open(str(file), "pt") as opened:
        described = opened.metadata()["agd"]
    old = tmp_path / "old.safetensors"
    save_file(adapter.state_dict(), str(old), {"agd": as_format_2(described)})
    found, weights = adapter_file.load_weights(old)
    assert found == info
    assert all(torch.equal(value, weights[key]) for key, value in adapter.state_dict().items())

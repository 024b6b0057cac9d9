"""An adapter as a LoRA file: its names, its weights, what can't be one. Loaders are in tests/comfy/test_low_rank.py."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.lora import export, lora, lora_key
from comfyui_agd.tests.support.small import info_for, randomised
from comfyui_agd.training import cli


@pytest.fixture
def info(base):
    return info_for(base, kind="low_rank", modulated=False, rank=3)


@pytest.fixture
def file(info, tmp_path):
    return adapter_file.save(tmp_path / "adapter.safetensors", randomised(Adapter(info.config)), info)


def test_names_are_those_of_kohyas_scripts():
    assert lora_key("input_blocks.1.1.transformer_blocks.0", "ff.net.0.proj") == (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_ff_net_0_proj"
    )


def test_the_strength_is_in_the_file(file):
    info, state = adapter_file.load_weights(file)
    found, name = lora(info, state, 4.0), "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj"
    assert len(found) == 3 * 10 * 2
    assert found[f"{name}.lora_up.weight"].shape == (8 * 32, 3)
    assert found[f"{name}.lora_down.weight"].shape == (3, 32)
    assert found[f"{name}.alpha"] == 3.0  # the rank: loaders multiply by alpha / rank
    torch.testing.assert_close(
        found[f"{name}.lora_up.weight"], 3.0 * state["kind.to_out.middle_0_0_ff_net_0_proj.weight"]
    )


def test_the_command_writes_what_lora_tools_read(file, tmp_path, capsys):
    output = tmp_path / "new" / "lora.safetensors"
    assert cli.main(["export", str(file), str(output), "--omega", "5"]) == 0
    assert capsys.readouterr().out == f"Wrote {output}: at strength 1 and cfg 1 it is guidance 5.\n"
    with safe_open(str(output), framework="pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "3"
        assert opened.metadata()["modelspec.description"].startswith("Guidance at scale 5 ")
        assert len(list(opened.keys())) == 60
    assert cli.main(["export", str(file), str(output), "--omega", "20"]) == 0
    assert "It was trained for guidance 1 to 12 only." in capsys.readouterr().out


@pytest.mark.parametrize("command", ["export", "import"])
@pytest.mark.parametrize("there", ["checkpoint", "another LoRA", "no tensors"])
def test_a_file_of_something_else_is_not_written_over(file, tmp_path, capsys, command, there):
    output, weights = tmp_path / "there.safetensors", {"model.x": torch.zeros(2)}
    content = {"checkpoint": save(weights), "another LoRA": save(weights, {"ss_network_dim": "4"}), "no tensors": b"?"}
    output.write_bytes(content[there])
    given = [command, str(file), str(output), *(["--omega", "5"] if command == "export" else [])]
    assert cli.main(given) == 1
    assert f"{output} is there already and no " in capsys.readouterr().err
    assert output.read_bytes() == content[there]


def test_an_adapter_is_not_written_over_by_its_lora(file, tmp_path, capsys):
    before, link = file.read_bytes(), tmp_path / "link.safetensors"
    link.symlink_to(file)
    other = Path(shutil.copy(file, tmp_path / "other.safetensors"))
    for output, told in ((file, "to be read"), (link, "to be read"), (other, "is there already and no LoRA of agd")):
        assert cli.main(["export", str(file), str(output), "--omega", "5"]) == 1
        assert told in capsys.readouterr().err
        assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"kind": "low_rank", "modulated": True}, "low_rank modulated by timestep and guidance"),
        ({"kind": "offset"}, "offset"),
    ],
)
def test_what_no_lora_can_be_is_refused(base, tmp_path, capsys, config, kind):
    info = info_for(base, **config)
    file = adapter_file.save(tmp_path / "other.safetensors", Adapter(info.config), info)
    assert cli.main(["export", str(file), str(tmp_path / "lora.safetensors"), "--omega", "5"]) == 1
    assert f"This adapter is {kind}, which no LoRA can express" in capsys.readouterr().err
    assert not (tmp_path / "lora.safetensors").exists()


@pytest.mark.parametrize("omega", [0.0, -3.0, float("nan"), float("inf")])
def test_an_omega_that_is_none_is_refused(file, tmp_path, omega):
    with pytest.raises(ValueError, match="must be a number above 0"):
        export(file, tmp_path / "lora.safetensors", omega)


def test_a_bad_output_is_refused(file, capsys):
    assert cli.main(["export", str(file), "lora.ckpt", "--omega", "5"]) == 1
    assert "must be a file that ends in .safetensors" in capsys.readouterr().err

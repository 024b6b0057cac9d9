"""Whether a file can be written, before the work that it is to hold: by a real attempt that leaves nothing behind."""

from pathlib import Path

import pytest

from comfyui_agd.agd_core.adapter_file import replacing
from comfyui_agd.agd_core.output_file import why_not_writable
from comfyui_agd.training import cli

READ_ONLY = Path("/proc")  # for the superuser too
LOAD = ("--loader", "some.module:load")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["a.safetensors", "new/folder/a.safetensors", "雪 (1).png"])
def test_what_can_be_written_leaves_no_trace(folder, name):
    (folder / "a.safetensors").write_text("earlier")
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")] if path != folder}
    assert why_not_writable([Path(name), folder / name]) is None
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert (folder / "a.safetensors").read_text() == "earlier"


def test_what_cannot_be_written_is_said(folder):
    (folder / "taken.png").mkdir()
    (folder / "file").write_text("")
    (folder / "dangling").symlink_to(folder / "gone")
    reasons = {
        folder / "taken.png": "taken.png is a folder",
        folder / "file" / "a.png": "file is no folder",
        folder / "dangling" / "a.png": "dangling is no folder",
        READ_ONLY / "a.png": "can't be written",
        READ_ONLY / "b" / "a.png": "can't be written",
        folder / f"{'a' * 252}.png": "File name too long",
        folder / ("b" * 300) / "a.png": "File name too long",
        folder / "a\ud800.png": "can't be written",
    }
    for path, reason in reasons.items():
        assert reason in why_not_writable([folder / "fine.png", path]), path
    assert sorted(path.name for path in folder.iterdir()) == ["dangling", "file", "taken.png"]


def test_a_name_is_tried_as_long_as_it_is_while_the_file_is_written(folder):
    for length in range(200, 256):
        file = folder / ("a" * length)
        try:
            with replacing(file) as temporary:
                Path(temporary).write_text("")
        except OSError:
            assert why_not_writable([file])
        else:
            assert why_not_writable([file]) is None


@pytest.mark.parametrize("output", ["/proc/a.safetensors", f"{'a' * 250}/a.safetensors", "file/a.safetensors"])
@pytest.mark.parametrize("command", ["train", "calibrate", "export"])
def test_an_adapter_file_that_cannot_be_written_is_refused_before_anything_is_loaded(folder, capsys, command, output):
    (folder / "file").write_text("")
    output = output.replace("a" * 250, "a" * 300)
    given = ("gone.safetensors", output, "--omega", "3") if command == "export" else (*LOAD, "--output", output)
    assert cli.main([command, *given]) == 1
    assert "agd: Choose another output: " in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["a.run", "a.run/previews", "a.run/best.safetensors"])
def test_what_is_in_the_way_of_the_runs_files_is_refused_too(folder, capsys, name):
    taken = folder / name
    if taken.suffix == ".safetensors":
        taken.mkdir(parents=True)
    else:
        taken.parent.mkdir(exist_ok=True)
        taken.write_text("")
    assert cli.main(["train", *LOAD, "--output", "a.safetensors"]) == 1
    assert f"{name} is " in capsys.readouterr().err


def test_recordings_reports_and_pictures_are_tried_too(folder, capsys):
    (folder / "taken.json").mkdir()
    evaluate = ("evaluate", "a.safetensors", *LOAD, "--prompts", "a star")
    for command, message in {
        ("record", *LOAD, "--output", "/proc/recording"): "recording.json can't be written",
        (*evaluate, "--json", "taken.json"): "taken.json is a folder",
        (*evaluate, "--picture", "/proc/a.png"): "/proc/a.png can't be written",
    }.items():
        assert cli.main(list(command)) == 1
        assert message in capsys.readouterr().err


def test_a_link_to_another_folder_is_one(folder, capsys):
    (folder / "elsewhere").mkdir()
    (folder / "link").symlink_to(folder / "elsewhere")
    assert why_not_writable([folder / "link" / "a.png", folder / "link" / "new" / "a.png"]) is None

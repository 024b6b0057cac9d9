"""The files of a run: whole at any moment, and each thing written once."""

import errno
import json
import os
import random
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from comfyui_agd.agd_core.adapter import Adapter
from comfyui_agd.agd_core.atomic import NotWritten, replacing, write_text
from comfyui_agd.agd_core.config import BaseInfo
from comfyui_agd.tests.support.small import info_for, small_layers
from comfyui_agd.training.run_folder import RunFolder, RunFolderError, folder_of


@pytest.fixture
def folder(tmp_path):
    files = RunFolder(tmp_path / "a.run")
    with files.held():
        yield files


@pytest.fixture
def adapter_and_info():
    info = info_for(BaseInfo("Small", "EPS", small_layers(), {}), hidden=512)
    return Adapter(info.config), info


def lines(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_beside_its_output(tmp_path):
    assert folder_of(tmp_path / "my.adapter.safetensors") == tmp_path / "my.adapter.run"


def test_the_newest_state_is_loaded_and_old_ones_go(folder):
    for step in (5, 10, 999_999, 1_000_000):
        folder.save_run_state(step, {"step": step}, keep=2)
    assert [path.name for path in folder.run_states()] == ["state-1000000.pt", "state-999999.pt"]
    assert folder.load_run_state()["step"] == 1_000_000


def test_no_state_is_none(folder):
    assert folder.load_run_state() is None


@pytest.mark.parametrize("damage", [b"", b"half a state", None])
def test_a_damaged_state_falls_back_to_the_one_before(folder, caplog, damage):
    for step in (5, 10):
        folder.save_run_state(step, {"step": step, "x": torch.zeros(1000)}, keep=2)
    newest = folder.run_states()[0]
    newest.write_bytes(newest.read_bytes()[:-500] if damage is None else damage)
    assert folder.load_run_state()["step"] == 5
    assert "state-000010.pt is damaged" in caplog.text


def test_no_readable_state_at_all_is_refused(folder):
    folder.save_run_state(5, {"step": 5}, keep=2)
    folder.run_states()[0].write_bytes(b"half a state")
    with pytest.raises(RunFolderError, match=r"No state in .* can be read; delete the folder to start anew"):
        folder.load_run_state()


def test_a_state_that_would_run_code_is_not_loaded(folder):
    class Evil:
        def __reduce__(self):
            return print, ("run!",)

    torch.save({"step": Evil()}, folder.path / "state-000005.pt")
    with pytest.raises(RunFolderError):
        folder.load_run_state()


def test_remains_of_a_killed_process_are_removed_and_what_is_not_ours_stays(tmp_path):
    files = RunFolder(tmp_path / "a.run")
    with files.held():
        files.save_run_state(5, {"step": 5}, keep=2)
    notes = [files.path / "notes.txt", files.path / "notes.part", files.path / "state-mine.pt"]
    remains = [files.path / ".state-000005.pt.abc.part", files.path / "previews" / ".step-000005.png.abc.part"]
    for path in [*notes, *remains]:
        path.write_bytes(b"half")
    with files.held():
        assert not any(path.exists() for path in remains)
        assert files.load_run_state() == {"step": 5}
        files.clear()
    assert all(path.exists() for path in notes)


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "a.run").write_text("a file")
    with (
        pytest.raises(
            RunFolderError, match=r"^The training's folder can't be written to: choose another output.*a\.run"
        ),
        RunFolder(tmp_path / "a.run").held(),
    ):
        pass


def full_disk(state, file):
    """What torch.save writes and raises when the disk is full; tests can't fill every machine's."""
    file.write(b"half a state")
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


SAYS = r"state of step 10 could not be saved; the same training goes on from step 5\. Details: .*state-000010\.pt "
SAYS += r"could not be written "


def test_a_full_disk_keeps_the_older_state_and_says_what_it_takes(folder, monkeypatch):
    folder.save_run_state(5, {"step": 5}, keep=1)
    monkeypatch.setattr(torch, "save", full_disk)
    found = SAYS + r"\(No space left on device\): it takes 4,000,000 bytes, and [\d,]+ are free there"
    with pytest.raises(RunFolderError, match=found):
        folder.save_run_state(10, {"step": 10, "x": [torch.zeros(1_000_000)]}, keep=1)
    assert folder.load_run_state() == {"step": 5}
    assert list(folder.path.glob(".*.part")) == []


@pytest.fixture
def small_files():
    """A real limit of the process on the size of a file, which its writers meet as a full disk: 100 kB."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_free_counts_what_was_written_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))

    def fill() -> None:
        with replacing(tmp_path / "a", 5_000_000) as temporary:
            Path(temporary).write_bytes(bytes(2000))
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(NotWritten, match="it takes 5,000,000 bytes, and 3,000 are free there"):
        fill()


def test_a_write_that_ends_half_way_keeps_the_older_state(folder, small_files):
    folder.save_run_state(5, {"step": 5}, keep=1)
    with pytest.raises(RunFolderError, match=SAYS + r"\(File too large\)") as refused:
        folder.save_run_state(10, {"step": 10, "x": torch.zeros(1_000_000)}, keep=1)
    assert "inline_container" not in str(refused.value)
    assert folder.load_run_state() == {"step": 5}
    assert list(folder.path.glob(".*.part")) == []


def test_of_everything_else_that_a_run_writes_the_log_says_so_once(folder, small_files, adapter_and_info, caplog):
    noise = Image.frombytes("RGB", (512, 512), random.Random(0).randbytes(3 * 512 * 512))
    writes = {
        "report.txt": lambda path: folder.save_text(path.name, "x" * 200_000),
        "previews/step.png": lambda path: folder.save_image("previews/step.png", noise),
        "metrics.jsonl": lambda path: folder.add_metrics(1, text="x" * 200_000),
        "best.safetensors": lambda path: folder.save_best(*adapter_and_info),
    }
    for name, write in writes.items():
        path = folder.path / name
        caplog.clear()
        write(path)
        write(path)
        (record,) = caplog.records
        told = (
            rf"one of its files\. Details: .*{name} could not be written \(.*\): it takes [\d,]+ bytes, and [\d,]+ are"
        )
        assert re.search(told, record.message)
        assert name == "metrics.jsonl" or not path.exists()
    assert list(folder.path.rglob("*.part")) == []


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_at_its_end_leaves_nothing(tmp_path, monkeypatch, fails):
    write_text(tmp_path / "a.txt", "before")
    monkeypatch.setattr(os, fails, lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(NotWritten, match=r"a\.txt could not be written \(Input/output error\): it takes 5 bytes"):
        write_text(tmp_path / "a.txt", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


def test_a_disk_that_knows_no_modes_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"


def test_metrics_go_on_after_the_state_that_was_loaded(folder):
    folder.start_metrics(0, measured=False)
    for step in (1, 2):
        folder.add_metrics(step, loss=1.0)
    folder.add_metrics(2, score=0.1)
    folder.add_metrics(3, loss=0.9)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    folder.start_metrics(2, measured=True)
    assert lines(folder) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 2, "score": 0.1}]
    folder.start_metrics(2, measured=False)
    assert lines(folder) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    folder.start_metrics(0, measured=False)
    assert lines(folder) == []


@pytest.mark.parametrize("line", ["[1]", "7", "null", '{"loss": 1.0}', '{"step": "2"}', "[" * 100_000, "\xff\xfe"])
def test_lines_of_metrics_that_are_not_ours_are_dropped(folder, line):
    (folder.path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n' + line.encode("latin1") + b"\n")
    folder.start_metrics(2, measured=True)
    assert lines(folder) == [{"step": 1, "loss": 1.0}]


class FailingBoard:
    """TensorBoard's writer, whose methods of these names fail."""

    def __init__(self, *names: str):
        self.names, self.called = names, []

    def __getattr__(self, name: str):
        def call(*args):
            self.called.append(name)
            if name in self.names:
                raise OSError("No space left on device")

        return call


def test_a_tensorboard_that_can_not_be_imported_stops_no_run(folder, monkeypatch, caplog):
    """Protobuf of another version raises TypeError, not ImportError."""

    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return ModuleSpec(name, Broken) if name == "tensorboard" else None

        @staticmethod
        def create_module(spec):
            return None

        @staticmethod
        def exec_module(module):
            raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file, ...")

    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard" or "torch.utils.tens" in name]:
        monkeypatch.delitem(sys.modules, name)
    folder.start_metrics(0, measured=False)
    folder.add_metrics(1, loss=1.0)
    assert lines(folder) == [{"step": 1, "loss": 1.0}]
    assert "TensorBoard is installed but fails" in caplog.text
    assert "(Descriptors cannot be created directly.)" in caplog.text


@pytest.mark.parametrize("fails", ["add_scalar", "close"])
def test_a_tensorboard_that_fails_later_stops_no_run(folder, caplog, fails):
    folder._board = board = FailingBoard(fails)
    for step in (1, 2):
        folder.add_metrics(step, loss=1.0)
    folder.close()
    assert board.called == {"add_scalar": ["add_scalar"], "close": ["add_scalar", "add_scalar", "close"]}[fails]
    assert lines(folder) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    assert caplog.text.count("TensorBoard is installed but fails") == 1


def test_a_finished_run_keeps_its_records_but_no_states(folder):
    folder.save_run_state(5, {"step": 5}, keep=2)
    (folder.path / "best.safetensors").write_bytes(b"an adapter")
    folder.start_metrics(0, measured=False)
    folder.clear()
    found = [path.name for path in folder.path.iterdir() if path.is_file() and not path.name.startswith(".")]
    assert sorted(found) == ["holder.txt", "metrics.jsonl"]

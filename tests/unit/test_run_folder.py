"""The files of a run: whole at any moment, and each thing written once."""

import errno
import json

import pytest
import torch

from comfyui_agd.training.run_folder import RunFolder, RunFolderError, folder_of


@pytest.fixture
def folder(tmp_path):
    files = RunFolder(tmp_path / "a.run")
    files.prepare()
    yield files
    files.close()


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


def test_remains_of_a_killed_process_are_removed(folder):
    remains = [folder.path / ".state-000005.pt.abc.part", folder.path / "previews" / ".step-000005.png.abc.part"]
    for path in remains:
        path.write_bytes(b"half")
    folder.save_run_state(5, {"step": 5}, keep=2)
    folder.prepare()
    assert not any(path.exists() for path in remains)
    assert folder.load_run_state() == {"step": 5}


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "a.run").write_text("a file")
    with pytest.raises(
        RunFolderError, match=r"^The training's folder can't be written to: choose another output.*a\.run"
    ):
        RunFolder(tmp_path / "a.run").prepare()


def full_disk(state, path):
    """What torch.save leaves behind and raises when the disk is full; tests can't fill every machine's."""
    with open(path, "wb") as file:
        file.write(b"half a state")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_older_state_and_says_so(folder, monkeypatch):
    folder.save_run_state(5, {"step": 5}, keep=1)
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(RunFolderError, match=r"state of step 10 could not be saved .*No space left.* make room"):
        folder.save_run_state(10, {"step": 10}, keep=1)
    assert folder.load_run_state() == {"step": 5}
    assert list(folder.path.glob(".*.part")) == []


def test_a_write_that_ends_half_way_keeps_the_older_state(folder):
    """torch's own writer at a real limit: that of the process on the size of a file."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    folder.save_run_state(5, {"step": 5}, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(RunFolderError, match=r"state of step 10 could not be saved .* make room"):
            folder.save_run_state(10, {"step": 10, "x": torch.zeros(1_000_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder.load_run_state() == {"step": 5}
    assert list(folder.path.glob(".*.part")) == []


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


def test_a_finished_run_keeps_its_records_but_no_states(folder):
    folder.save_run_state(5, {"step": 5}, keep=2)
    (folder.path / "best.safetensors").write_bytes(b"an adapter")
    folder.start_metrics(0, measured=False)
    folder.clear()
    assert [path.name for path in folder.path.iterdir() if path.is_file()] == ["metrics.jsonl"]

"""Two processes and one folder: the second is told who has it, and a killed one leaves it free."""

import errno
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel, Stopped
from comfyui_agd.training import folder_lock
from comfyui_agd.training.folder_lock import FolderInUse
from comfyui_agd.training.job import Job
from comfyui_agd.training.run_folder import RunFolder
from comfyui_agd.training.trainer import Callbacks

HOLD = """
import sys, time
from pathlib import Path
from comfyui_agd.training import folder_lock
if sys.argv[2] == "without locks":
    from comfyui_agd.tests.unit.test_folder_lock import no_locks
    no_locks(Path(sys.argv[1]))
with folder_lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def no_locks(folder: Path, error: Exception | None = None) -> None:
    """Locks in that folder, and in no other, fail as they do on some network disks."""
    real = filelock.FileLock.acquire

    def acquire(self, *args, **kwargs):
        if Path(self.lock_file).parent == folder:
            raise error or OSError(errno.ENOLCK, "No locks available")
        return real(self, *args, **kwargs)

    filelock.FileLock.acquire = acquire


@contextmanager
def holder(folder: Path, how: str = "locked"):
    """Another process that has the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def told(folder: Path, process: subprocess.Popen) -> str:
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    return (
        rf"Another training .* process {process.pid} on \S+, since {since}\. Wait .* Details: {re.escape(str(folder))}"
    )


def test_the_second_is_refused_with_who_has_it_and_goes_on_when_that_one_is_killed(tmp_path):
    with holder(tmp_path) as process:
        for _ in range(2):
            with pytest.raises(FolderInUse, match=told(tmp_path, process)), folder_lock.held(tmp_path):
                pass
        process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        process.wait()
        with folder_lock.held(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / "holder.txt").read_text()
    assert not (tmp_path / "holder.txt").exists()


def test_one_process_does_not_have_it_twice_and_has_it_again_after_an_error(tmp_path):
    def stopped():
        with folder_lock.held(tmp_path):
            with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"), folder_lock.held(tmp_path):
                pass
            raise Stopped

    for _ in range(2):
        with pytest.raises(Stopped):
            stopped()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks"), OSError(errno.ENOTSUP, "No"), NotImplementedError("flock")]
)
def test_on_a_disk_without_locks_this_machine_still_has_one_of_them(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr(filelock.FileLock, "acquire", filelock.FileLock.acquire)
    no_locks(tmp_path, error)
    with holder(tmp_path, "without locks") as process:
        with pytest.raises(FolderInUse, match=told(tmp_path, process)), folder_lock.held(tmp_path):
            pass
        assert f"the disk of {tmp_path} has no locks" in caplog.text
        process.kill()
        process.wait()
        with folder_lock.held(tmp_path):
            pass


def test_what_a_stranger_wrote_there_is_not_shown_raw(tmp_path):
    with holder(tmp_path):
        for text, shown in ((b"\x1b[31m" + b"x" * 5000, rf": \[31mx{{{200 - 5}}}\."), (b"", ": it doesn't say which")):
            (tmp_path / "holder.txt").write_bytes(text)
            with pytest.raises(FolderInUse, match=shown), folder_lock.held(tmp_path):
                pass


def test_a_second_training_into_one_output_harms_nothing(tmp_path):
    job = Job(AnalyticModel(), PROMPTS, CONFIG, tmp_path / "mine.safetensors")
    job.folder.mkdir()
    writing = job.folder / ".state-000005.pt.abc.part"
    with holder(job.folder):
        writing.write_bytes(b"the other one is at it")
        before = sorted(job.folder.iterdir())
        with pytest.raises(FolderInUse):
            job.run(Callbacks(), None, {})
        assert [path for path in sorted(job.folder.iterdir()) if path.name != "previews"] == before
    job.run(Callbacks(), None, {})
    assert job.output.exists()
    assert not writing.exists()


def test_a_second_recording_into_one_folder_is_refused(tmp_path):
    job = Job(AnalyticModel(), PROMPTS, CONFIG, tmp_path, [""])
    with holder(tmp_path), pytest.raises(FolderInUse, match="Another training or recording"):
        job.record(2, Callbacks())
    assert job.record(2, Callbacks()).batches == 2


def test_the_output_is_written_while_the_folder_is_held(tmp_path, monkeypatch):
    """Else a second one could begin between the training's end and its file."""
    job, found = Job(AnalyticModel(), PROMPTS, CONFIG, tmp_path / "mine.safetensors"), []

    def save(path, *_):
        with pytest.raises(FolderInUse), RunFolder(job.folder).held():
            pass
        found.append(path)

    monkeypatch.setattr("comfyui_agd.training.job.adapter_file.save", save)
    job.run(Callbacks(), None, {})
    assert found[-1] == job.output

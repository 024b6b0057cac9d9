"""One process at a time in a folder that it writes to for hours, on whatever disk it is."""

import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import filelock

from ..agd_core.atomic import write_text
from ..agd_core.errors import AGDError
from ..agd_core.text import logger

log = logger(__name__)

# Two files: on Windows, and on some network disks anywhere, nobody else can read what is locked.
_LOCK, _HOLDER = ".lock", "holder.txt"


class FolderInUse(AGDError, RuntimeError):
    """Another process writes to that folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, the folder is this process' alone; a killed process leaves it free. Raises `FolderInUse`.

    `holder.txt` says who has it.
    """
    holder = folder / _HOLDER
    try:
        lock = _lock(folder)
    except filelock.Timeout:
        raise FolderInUse(
            f"Another training or recording is writing there: {_who(holder)}. Wait until it ends, stop it, or choose "
            f"another output. Details: {folder}."
        ) from None
    try:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        write_text(holder, f"process {os.getpid()} on {platform.node()}, since {now}\n")
        yield
    finally:
        with suppress(OSError):  # on Windows it stays while somebody reads it
            holder.unlink()
        lock.release()


def _lock(folder: Path) -> filelock.BaseFileLock:
    """The lock, taken. Raises `filelock.Timeout` if another has it."""
    try:
        return _taken(folder / _LOCK)
    except filelock.Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        log.warning(
            "AGD: the disk of %s has no locks (%s): see to it that no other machine writes there.", folder, error
        )
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return _taken(Path(tempfile.gettempdir()) / f"agd-{name}.lock")  # at least on this machine


def _taken(path: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(os.fspath(path))
    lock.acquire(timeout=0)
    return lock


def _who(holder: Path) -> str:
    """What the file says, of which anybody may have written anything."""
    try:
        text = holder.read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        return "it doesn't say which"
    return "".join(character for character in text if character.isprintable()).strip() or "it doesn't say which"

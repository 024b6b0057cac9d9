"""Files that are written whole or not at all: what was there before stays until what takes its place is complete."""

import contextlib
import errno
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .errors import AGDError

# On Windows a file that another program has open, or has mapped into its memory, can't be replaced: EACCES.
_REFUSED = (errno.EACCES, errno.EPERM, errno.EBUSY)


class NotWritten(AGDError, OSError):
    """A file could not be written; the one before is still there."""


@contextlib.contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[str]:
    """`with replacing(path) as temporary`: what is written to `temporary` takes the place of `path` on success.

    `size`: bytes that will be written, as far as they are known before. Raises `NotWritten` where the disk is full or
    refuses; nothing is left behind then.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        yield temporary
        _put(temporary, path)
    except (OSError, SafetensorError) as error:
        raise NotWritten(_why(path, error, size, _size_of_file(temporary))) from error
    finally:
        with contextlib.suppress(OSError):  # it has its place, or is another program's on Windows
            os.unlink(temporary)


def _put(temporary: str, path: Path) -> None:
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())  # or a power cut could leave an empty file under the good one's name
    with contextlib.suppress(OSError):  # some mounts know no modes
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner alone
    os.replace(temporary, path)


def _size_of_file(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _why(path: Path, error: Exception, size: int, written: int = 0) -> str:
    """`size`, `written`: bytes in all, as far as known, and so far, which are free again."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    if number == errno.EROFS:
        return f"{path} could not be written ({reason}): its disk can only be read; choose another place."
    if number in _REFUSED:
        return (
            f"{path} could not be written ({reason}): another program has it open, or this one may not write there; "
            "close that program, allow it, or choose another place."
        )
    place = next((each for each in path.absolute().parents if each.is_dir()), None)
    free = shutil.disk_usage(place).free + written if place else 0
    return (
        f"{path} could not be written ({reason}): it takes {max(size, written):,} bytes, and {free:,} are free there; "
        "make room, or choose another place."
    )


def remove_remains(folder: Path, name: str = "") -> None:
    """Of processes that were killed while they wrote: of the file of that name in `folder`, or of any."""
    for remains in folder.glob(".*.part"):
        if remains.name.startswith(f".{name}." if name else ".") and remains.is_file():
            remains.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Raises `NotWritten`."""
    with replacing(path, len(data)) as temporary:
        Path(temporary).write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """As UTF-8, with the lines' ends as they are. Raises `NotWritten`."""
    write_bytes(path, text.encode())


def append_text(path: Path, text: str) -> None:
    """To the end of a file, which a process that is killed may leave with a half line. Raises `NotWritten`."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise NotWritten(_why(path, error, len(text.encode()))) from error


def write_torch(path: Path, value: Any) -> None:
    """As `torch.save` writes it. Raises `NotWritten`."""
    with replacing(path, bytes_of(value)) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None  # on a full disk torch's writer fails once more, and says nothing
            raise


def read_torch(path: Path) -> Any:
    """What `write_torch` wrote, on the CPU; no code of the file runs. Raises whatever a damaged one makes torch raise.

    Its checksums are compared, which torch writes but doesn't look at.
    """
    with zipfile.ZipFile(path) as file:
        if (wrong := file.testzip()) is not None:
            raise ValueError(f"the checksum of {wrong} differs")
    with torch.inference_mode(False):  # in which nodes run: nothing could be trained on from there
        return torch.load(path, map_location="cpu", weights_only=True)


def bytes_of(value: Any) -> int:
    """What the tensors in dicts and lists take."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(bytes_of, values))

"""Whether files can be written where they are wanted, found out by writing: before the work that they are to hold."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

# What a file is called while it is written (`adapter_file.replacing`) has so many characters more.
_BEFORE, _AFTER = ".", ".12345678.part"


def why_not_writable(files: Sequence[Path]) -> str | None:
    """What keeps one of `files` from being written, in a phrase, or None. Folders that there aren't yet will be made.

    Nothing is left behind, and nothing that is there is touched.
    """
    return next((reason for file in files if (reason := _in_the_way(file) or _failure(file))), None)


def _in_the_way(file: Path) -> str | None:
    # pathlib's `is_dir` raises where a name is too long, which `_failure` tells.
    if os.path.isdir(file):
        return f"{file} is a folder"
    blocked = next((each for each in file.parents if os.path.lexists(each) and not os.path.isdir(each)), None)
    return f"{blocked} is no folder" if blocked else None


def _failure(file: Path) -> str | None:
    """Of an attempt to write a file of that name, and its folders, in a temporary folder beside them."""
    file = file.absolute()
    try:
        str(file).encode()  # safetensors takes no other names
        there = next(parent for parent in file.parents if os.path.isdir(parent))
        with tempfile.TemporaryDirectory(prefix=".", dir=there) as folder:
            tried = Path(folder, file.relative_to(there))
            tried.parent.mkdir(parents=True, exist_ok=True)
            tried.with_name(f"{_BEFORE}{file.name}{_AFTER}").write_text("can be written", "utf-8")
    except (OSError, ValueError) as error:
        return f"{file} can't be written ({getattr(error, 'strerror', None) or error})"
    return None

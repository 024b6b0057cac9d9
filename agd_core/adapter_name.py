"""The one rule for an adapter's name, for nodes and the command line alike.

It allows what every system that ComfyUI runs on can keep as a file, and what the loader lists afterwards.
"""

from .errors import AGDError

SUFFIX = ".safetensors"
_LONGEST = 200  # bytes in UTF-8; file systems take 255, and temporary files have longer names
_FORBIDDEN = '<>:"|?*\\'  # by Windows; "/" is for subfolders
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}  # by Windows, with any suffix
_RESERVED |= {f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³"}


class AdapterNameError(AGDError, ValueError):
    """A name that no adapter can have."""


def _without_suffix(name: str) -> str:
    return name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name


def _reasons_of(part: str) -> list[str]:
    """What is wrong with one part, between slashes, of a name."""
    beginning = part.split(".")[0].rstrip().upper()
    checks = {
        "it has nothing between two slashes": not part,
        "it begins with a dot, or a part of it does": part.startswith("."),
        "it ends with a dot, or a part of it does": part.endswith("."),
        "it begins or ends with a space, or a part of it does": part != part.strip(),
        "it holds characters that can't be seen": not part.isprintable(),
        f"it holds one of {' '.join(_FORBIDDEN)}": any(character in part for character in _FORBIDDEN),
        f"Windows keeps {beginning} for itself": beginning in _RESERVED,
    }
    return [reason for reason, fails in checks.items() if fails]


def why_invalid(name: str) -> str | None:
    """What is wrong with a name, in one sentence that says what to do, or None if nothing is."""
    stem = _without_suffix(name)
    *folders, last = stem.split("/")
    checks = {
        "it is empty": not stem or stem.isspace(),
        "it begins with a slash": stem.startswith("/"),
        "folders that end in .run hold the files of trainings": any(f.lower().endswith(".run") for f in folders),
        # What has no encoding is nothing that can be seen, which is told below.
        f"it is longer than {_LONGEST} bytes": len(f"{stem}{SUFFIX}".encode(errors="replace")) > _LONGEST,
    }
    reasons = [reason for reason, fails in checks.items() if fails]
    reasons += [reason for part in (*folders, last) for reason in _reasons_of(part)]
    if not reasons:
        return None
    return f"No adapter can be called {name!r:.80}: {reasons[0]}. Choose a name such as 'my_adapter' or 'sdxl/mine'."


def file_name(name: str) -> str:
    """The adapter's file for a name that was given with the suffix or without. Raises `AdapterNameError`."""
    if reason := why_invalid(name):
        raise AdapterNameError(reason)
    return _without_suffix(name) + SUFFIX

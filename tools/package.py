"""Builds the archive that the registry serves: build/NAME-VERSION.zip.

It holds what comfy-cli publishes: the files that git tracks, without those that .comfyignore names in .gitignore's
syntax. Equal files make an equal archive.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The earliest date that an archive can hold.
_DATE = (1980, 1, 1, 0, 0, 0)
_UNIX, _READABLE = 3, 0o644 << 16


def tracked(*flags: str) -> list[str]:
    """What `git ls-files` lists with these flags and is there."""
    command = ["git", "-c", "core.quotePath=false", "ls-files", "-z", *flags]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode("utf-8")
    return sorted({name for name in listed.split("\0") if name and (ROOT / name).is_file()})


def published() -> list[str]:
    ignored = set(tracked("--cached", "--ignored", "--exclude-from=.comfyignore"))
    return [name for name in tracked() if name not in ignored]


def _file_name() -> str:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    name, version = (re.search(rf'^{key} = "(.+)"$', text, re.MULTILINE)[1] for key in ("name", "version"))
    return f"{name}-{version}.zip"


def build(folder: Path = ROOT / "build") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / _file_name()
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in published():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system, entry.external_attr = _UNIX, _READABLE
            zipped.writestr(entry, (ROOT / name).read_bytes(), zipfile.ZIP_DEFLATED)
    return archive


if __name__ == "__main__":
    try:
        archive = build()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"[package] {error}. The archive is made of what git tracks: git and a clone of the repository.")
    print(f"{archive.relative_to(ROOT)}: {len(published())} files, {archive.stat().st_size / 1e3:.0f} kB")

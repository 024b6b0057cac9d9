"""The archive that the registry serves, unpacked as a user has it; and what a user's Python can import."""

import re
import zipfile
from importlib import metadata
from pathlib import Path

from comfyui_agd.tools.package import build


def unpack(folder: Path) -> Path:
    """The archive's files in `folder`, which is returned."""
    with zipfile.ZipFile(build(folder.parent)) as archive:
        archive.extractall(folder)
    return folder


def _name(requirement: str) -> str:
    """A distribution's name in one spelling, without versions and markers."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def _needed_by(distribution: str) -> list[str]:
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []  # of another system or Python
    return [_name(each) for each in requirements if "extra ==" not in each]


def _brought_by(requirements: Path) -> set[str]:
    """The distributions that installing this file brings."""
    lines = requirements.read_text("utf-8").splitlines()
    found, new = set(), {_name(line) for line in lines if line[:1].isalnum()}
    while new:
        found |= new
        new = {each for distribution in new for each in _needed_by(distribution)} - found
    return found


def modules_of(requirements: Path) -> tuple[set[str], set[str]]:
    """The top modules that installing this file brings; those that are installed here beside them."""
    brought, installed = _brought_by(requirements), metadata.packages_distributions()
    there = {module for module, owners in installed.items() if brought & set(map(_name, owners))}
    # What other systems or Pythons need isn't installed here; its modules are called as it is.
    return there | {name.replace("-", "_") for name in brought}, set(installed) - there

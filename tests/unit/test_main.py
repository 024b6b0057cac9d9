"""`python __main__.py` and `python FOLDER`: the command from a folder of any name, however it is spelled."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In place of the command line: what it was given, and whether the pack's `nodes` hides a module of that name.
CLI = """
import importlib.util, sys
def main():
    print(sys.argv[1:], importlib.util.find_spec("nodes"), __name__)
    return 3
"""


@pytest.fixture(params=["agd", "my päck (包) v1.0"])
def folder(request, tmp_path) -> Path:
    """The pack's entry points in a folder of that name."""
    folder = tmp_path / "custom nodes" / request.param
    for package in ("nodes", "training"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "training" / "cli.py").write_text(CLI)
    return folder


def runs(cwd: Path, *command: object) -> None:
    done = subprocess.run([sys.executable, "-S", *map(str, command)], capture_output=True, text=True, cwd=cwd)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "['train', 'a b'] None comfyui_agd.training.cli\n"


@pytest.mark.parametrize("spelled", ["__main__.py", "./__main__.py", "."])
def test_from_inside_the_folder(folder, spelled):
    runs(folder, spelled, "train", "a b")


def test_from_outside_by_relative_paths(folder):
    for cwd, spelled in ((folder.parent, Path(folder.name)), (folder / "nodes", Path(".."))):
        runs(cwd, spelled, "train", "a b")
        runs(cwd, spelled / "__main__.py", "train", "a b")


def test_from_anywhere_by_absolute_paths(folder, tmp_path):
    for cwd in (folder, folder.parent, tmp_path):
        runs(cwd, folder, "train", "a b")
        runs(cwd, folder / "__main__.py", "train", "a b")
    runs(tmp_path, f"{folder}/", "train", "a b")


def test_through_a_link(folder, tmp_path):
    (tmp_path / "linked").symlink_to(folder, target_is_directory=True)
    runs(tmp_path, "linked", "train", "a b")
    runs(tmp_path / "linked", "__main__.py", "train", "a b")


def test_where_python_leaves_the_folder_off_its_path(folder):
    if sys.version_info < (3, 11):
        pytest.skip("-P is of Python 3.11")
    runs(folder, "-P", "__main__.py", "train", "a b")

"""What the archive that the registry publishes holds, and what the registry and strangers must not find in it."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {"tests", "tools", "benchmarks", "docs", "examples", ".ci", ".comfyignore", ".gitignore", "Makefile"}


def tracked(*flags: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def published() -> list[str]:
    """What the registry's archive holds: .comfyignore is gitignore's syntax, so git itself is asked."""
    ignored = set(tracked("--cached", "--ignored", "--exclude-from=.comfyignore"))
    return [name for name in tracked() if name not in ignored]


def test_the_published_archive_holds_the_runtime_and_all_of_it():
    kept = set(published())
    assert {"__init__.py", "agd_core/__init__.py", "training/cli.py", "pyproject.toml", "README.md"} <= kept
    assert not {Path(name).parts[0] for name in kept} & LEFT_OUT
    # A pattern for a folder of the root must not drop another folder of that name.
    assert [name for name in tracked() if Path(name).parts[0] not in LEFT_OUT and name not in kept] == []


def test_the_published_archive_has_a_help_page_and_a_workflow_for_every_node():
    nodes = re.findall(r'node_id="(\w+)"', "".join(map(Path.read_text, (ROOT / "nodes").rglob("*.py"))))
    assert len(nodes) >= 4
    assert {f"web/docs/{node}.md" for node in nodes} <= set(published())
    assert len([name for name in published() if name.startswith("example_workflows/")]) >= 2 * len(nodes)


def test_the_published_archive_has_nothing_that_the_registry_flags():
    flagged = re.compile(r"\b(eval|exec|__import__)\(|subprocess|os\.system|urllib|requests|socket|pip install|pickle")
    found = {name: flagged.findall((ROOT / name).read_text()) for name in published() if name.endswith(".py")}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_requirements_bring_nothing_that_comfyui_does_not():
    comfyui = sorted((ROOT / ".comfyui").glob("ComfyUI-*/requirements.txt"))
    if not comfyui:
        pytest.skip("another ComfyUI is in use; its requirements are its own")

    def names(file: Path) -> set[str]:
        return {re.split(r"[<>=~ ]", line)[0].lower() for line in file.read_text().splitlines() if line[:1].isalpha()}

    assert names(ROOT / "requirements.txt") <= names(comfyui[-1])


def test_no_machine_paths_in_tracked_files():
    pattern = re.compile(r"(^|[^A-Za-z0-9_.])/(home|root|Users)/\w")
    texts = [name for name in tracked() if name.endswith((".py", ".md", ".json", ".toml", ".txt", "Makefile"))]
    assert [name for name in texts if pattern.search((ROOT / name).read_text()) and name != "LICENSE"] == []


def test_an_installed_pack_has_all_of_its_packages():
    folders = [file.parent for name in ("agd_core", "nodes", "training") for file in (ROOT / name).rglob("__init__.py")]
    expected = {"comfyui_agd", *(".".join(("comfyui_agd", *folder.relative_to(ROOT).parts)) for folder in folders)}
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    assert set(re.findall(r'"([^"]+)"', listed)) == expected

"""The archive that the registry serves, unpacked: what it holds, and what nobody may find in it."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

from comfyui_agd.agd_core.comfyui.runtime import find_comfyui
from comfyui_agd.tests.support.archive import modules_of, unpack
from comfyui_agd.tests.support.imports import COMFYUI, outside
from comfyui_agd.tools.package import build, tracked

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"agd_core", "nodes", "training", "web", "example_workflows", "locales"}
FILES = {"__init__.py", "__main__.py", "pyproject.toml", "requirements.txt", "README.md", "CHANGELOG.md", "LICENSE"}
NODES = sorted(
    node for file in (ROOT / "nodes").glob("*.py") for node in re.findall(r'node_id="(\w+)"', file.read_text("utf-8"))
)
LONGEST_PATH = 150  # of Windows' 260, what is left behind a user's ComfyUI/custom_nodes


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    return unpack(tmp_path_factory.mktemp("archive") / "AGD für Bilder 包")


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def texts(pack: Path, pattern: str) -> dict[str, str]:
    return {file.relative_to(pack).as_posix(): file.read_text("utf-8") for file in pack.glob(pattern)}


def test_it_holds_the_runtime_and_all_of_it(pack):
    assert {path.name for path in pack.iterdir()} <= FOLDERS | FILES
    wanted = [name for name in tracked() if name.split("/")[0] in FOLDERS | FILES]
    assert names(pack) == sorted(wanted)


def test_equal_files_make_an_equal_archive(pack, tmp_path):
    assert build(tmp_path).read_bytes() == next(pack.parent.glob("*.zip")).read_bytes()


def test_every_node_has_a_help_page(pack):
    assert len(NODES) >= 4
    assert {f"web/docs/{node}.md" for node in NODES} <= set(names(pack))


def test_every_node_is_in_a_template(pack):
    templates = texts(pack, "example_workflows/*.json").values()
    assert [node for node in NODES if not any(f'"type": "{node}"' in text for text in templates)] == []


def test_every_template_has_a_thumbnail(pack):
    templates = list((pack / "example_workflows").glob("*.json"))
    assert templates
    assert [file.name for file in templates if not file.with_suffix(".jpg").is_file()] == []


def test_every_node_is_in_the_texts_of_every_language(pack):
    for name, text in texts(pack, "locales/*/nodeDefs.json").items():
        assert set(json.loads(text)) == set(NODES), name


def test_links_in_help_pages_are_addresses_or_files_in_it(pack):
    link = re.compile(r'(?:\]\(|src="|href=")([^)"#\s]+)')
    pages = texts(pack, "web/docs/**/*.md")
    links = [(name, target) for name, text in pages.items() for target in link.findall(text)]
    missing = [
        (name, target)
        for name, target in links
        if not target.startswith("https://") and not (pack / name).parent.joinpath(target).is_file()
    ]
    assert missing == []


def test_it_has_nothing_that_the_registry_flags(pack):
    flagged = re.compile(r"\b(eval|exec|__import__)\(|subprocess|os\.system|urllib|requests|socket|pip install|pickle")
    found = {name: flagged.findall(text) for name, text in texts(pack, "**/*.py").items()}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_it_imports_nothing_that_comfyui_does_not_bring():
    brought, _ = modules_of(find_comfyui() / "requirements.txt")
    files = [ROOT / name for name in tracked() if name.endswith(".py") and name.split("/")[0] in FOLDERS | FILES]
    missing = {file.name: outside(file) - brought - COMFYUI for file in files}
    assert {name: modules for name, modules in missing.items() if modules} == {}


def opens_text_without_encoding(call: ast.Call) -> bool:
    """`open(...)`, `path.open(...)`, `path.read_text()`, `path.write_text(...)` in the encoding of the system."""
    name = ast.unparse(call.func)
    # `Image.open(file)` and its like have a class before the dot.
    if not re.search(r"(^|\.)open$|\.(read|write)_text$", name) or re.search(r"\b[A-Z]\w*\.open$", name):
        return False
    constants = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    is_binary = any(re.fullmatch(r"[rwax+]*b[rwax+]*", each) for each in constants)
    return not (is_binary or "utf-8" in constants or any(keyword.arg == "encoding" for keyword in call.keywords))


def test_text_files_are_read_and_written_in_one_encoding_on_every_system(pack):
    found = [
        f"{name}:{node.lineno}"
        for name, text in texts(pack, "**/*.py").items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and opens_text_without_encoding(node)
    ]
    assert found == []


def test_windows_can_hold_its_names(pack):
    found = names(pack)
    assert len({name.lower() for name in found}) == len(found)
    refused = [
        name
        for name in found
        if not name.isascii()
        or len(name) > LONGEST_PATH
        or re.search(r'[<>:"\\|?*]|[ .](/|$)', name)
        or PureWindowsPath(name).is_reserved()
    ]
    assert refused == []


@pytest.mark.parametrize("encoding", ["cp1252", "cp932"])
def test_its_command_explains_itself_in_a_window_of_windows(pack, encoding):
    """By the folder, which nothing installed, in encodings that don't have all letters."""
    subprocess.run(
        [sys.executable, pack, "train", "--help"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
        cwd=pack.parent,
    )


def test_no_machine_paths_in_tracked_files():
    pattern = re.compile(r"(^|[^A-Za-z0-9_.])/(home|root|Users)/\w")
    texts = [name for name in tracked() if name.endswith((".py", ".md", ".json", ".toml", ".txt", "Makefile"))]
    assert [name for name in texts if pattern.search((ROOT / name).read_text("utf-8")) and name != "LICENSE"] == []


def test_an_installed_pack_has_all_of_its_packages():
    folders = [file.parent for name in ("agd_core", "nodes", "training") for file in (ROOT / name).rglob("__init__.py")]
    expected = {"comfyui_agd", *(".".join(("comfyui_agd", *folder.relative_to(ROOT).parts)) for folder in folders)}
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)[1]
    assert set(re.findall(r'"([^"]+)"', listed)) == expected

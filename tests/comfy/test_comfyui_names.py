"""What the shipped code uses of ComfyUI's modules is what docs/architecture.md lists, and this ComfyUI has it."""

import ast
import importlib
import importlib.util
import re
from collections import defaultdict
from functools import cache

import pytest

from comfyui_agd.tests.support.imports import COMFYUI, ROOT
from comfyui_agd.tools.package import published, tracked

MODULES = COMFYUI - {"comfy_kitchen"}  # a package of its own
SECTION = "## What is used of ComfyUI\n"


@cache
def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def split(path: str) -> tuple[str, str] | None:
    """A dotted path as a module and its attribute; None for a module."""
    module, *rest = path.split(".")
    while rest and is_module(f"{module}.{rest[0]}"):
        module = f"{module}.{rest.pop(0)}"
    return (module, rest[0]) if rest else None


def bound_names(tree: ast.AST) -> dict[str, str]:
    """What a source's imports of ComfyUI bind, with the dotted path of each."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # "import a.b" binds a, "import a.b as c" binds a.b.
            bound |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: path for name, path in bound.items() if path.split(".")[0] in MODULES}


def used_in(text: str) -> set[tuple[str, str]]:
    tree = ast.parse(text)
    bound = bound_names(tree)
    chains = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    # Of "f(x).y" and "f[x].y" the part before is a chain of its own.
    first = [chain.partition(".") for chain in chains if re.fullmatch(r"[\w.]+", chain)]
    paths = {f"{bound[name]}.{rest}" for name, _, rest in first if name in bound} | set(bound.values())
    return {found for found in map(split, paths) if found}


def used() -> dict[str, set[str]]:
    found = defaultdict(set)
    for name in published():
        if name.endswith(".py"):
            for module, attribute in used_in((ROOT / name).read_text("utf-8")):
                found[module].add(attribute)
    return dict(found)


def rows() -> list[list[list[str]]]:
    """The table's rows: of each column the names in backticks."""
    section = (ROOT / "docs" / "architecture.md").read_text("utf-8").split(SECTION)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", column) for column in line.strip("|").split(" | ")] for line in lines]


def listed() -> dict[str, set[str]]:
    return {module: set(names) for (module,), names, *_ in rows()}


def test_names_are_found_however_they_are_imported():
    text = """
import comfy.samplers, server, torch.nn
import comfy.model_patcher as patching
from comfy import model_sampling
from comfy.utils import ProgressBar as Bar
def later():
    return comfy.samplers.CFGGuider.predict_noise(torch.nn.Linear), model_sampling.EPS(1).EDM, patching.ModelPatcher
"""
    expected = {("comfy.samplers", "CFGGuider"), ("comfy.model_sampling", "EPS"), ("comfy.utils", "ProgressBar")}
    assert used_in(text) == expected | {("comfy.model_patcher", "ModelPatcher")}


def test_the_documented_names_are_those_that_are_used():
    assert listed() == used()


def test_this_comfyui_has_them():
    missing = [
        f"{module}.{name}"
        for module, names in listed().items()
        for name in sorted(names)
        if not (is_module(module) and hasattr(importlib.import_module(module), name))
    ]
    assert missing == []


@pytest.mark.parametrize(("module", "_", "places", "tests"), rows(), ids=lambda column: column[0])
def test_the_places_and_tests_are_there(module, _, places, tests):
    shipped = [name for name in published() if name.endswith(".py")]
    assert [place for place in places if not any(f"/{place}" in f"/{name}" for name in shipped)] == []
    assert tests
    assert set(tests) <= set(tracked())

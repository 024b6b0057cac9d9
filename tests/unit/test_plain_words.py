"""Texts that users read have the field's words, and none of the method's symbols or of the code's own terms."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# `--omega-max` and `omega_max` are names of settings, and may be there.
WORDS = re.compile(r"(?<![-\w])omega\b(?![-_])|psi\b|\btrajector|\brollouts?\b|\broll(s|ed|ing)? out\b", re.IGNORECASE)
# They explain the method and the code.
OF_METHOD_AND_CODE = ("method.md", "architecture.md")
FOR_USERS = [path for folder in ("docs", "web/docs") for path in (ROOT / folder).glob("*.md")]
PAGES = ["README.md", "CHANGELOG.md", *sorted(str(path.relative_to(ROOT)) for path in FOR_USERS)]
FOLDERS = ("training", "agd_core", "nodes")


def unwanted(text: str) -> list[str]:
    return [text[max(0, found.start() - 30) : found.end() + 30] for found in WORDS.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if not page.endswith(OF_METHOD_AND_CODE)])
def test_pages_have_the_words_of_their_readers(page):
    assert unwanted((ROOT / page).read_text(encoding="utf-8")) == []


def texts(path: Path) -> Iterator[str]:
    """What a module may show to someone: its constants with a space in them, but for docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield from [node.value] if " " in node.value else []


@pytest.mark.parametrize("folder", FOLDERS)
def test_messages_and_helps_have_the_words_of_their_readers(folder):
    found = {
        f"{path.relative_to(ROOT)}: {text}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for text in texts(path)
        if unwanted(text)
    }
    assert found == set()

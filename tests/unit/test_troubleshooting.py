"""docs/troubleshooting.md answers every message of a sampling, and names none that doesn't exist."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = ROOT / "agd_core" / "comfyui" / "sampling" / "messages.py"
SHORTEST = 12  # characters of a message that tell which it is
GAP = "..."


def text_of(node: ast.AST) -> str | None:
    """A constant or an f-string, with a gap for each value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or GAP for part in node.values)
    return None


def texts(path: Path) -> Iterator[str]:
    statements = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr):
            statements.add(node.value)
        elif node not in statements and (text := text_of(node)):
            yield text


def first_sentence(message: str) -> str:
    return re.split(r"(?<=[a-z])\. ", message)[0].rstrip(".")


def messages() -> list[str]:
    """Those that a node may show: what the module's constants and functions give, without parts of others."""
    found = []
    for node in ast.parse(MESSAGES.read_text(encoding="utf-8")).body:
        values = [node.value] if isinstance(node, ast.Assign) else []
        values += [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
        found += [text for value in values if (text := text_of(value))]
    return found


def quoted() -> list[str]:
    """The first cells of the tables."""
    rows = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.splitlines() if line.startswith("| ")]
    return [row for row in rows if row not in ("it says", "---")]


@cache
def said() -> str:
    """Every text of the pack, in one."""
    paths = [path for folder in ("agd_core", "nodes", "training") for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(text for path in paths for text in texts(path)).lower()


def test_there_are_messages():
    assert len(messages()) > 20


@pytest.mark.parametrize("message", messages())
def test_every_message_is_answered(message):
    assert any(cell.startswith(first_sentence(message)) for cell in quoted())


@pytest.mark.parametrize("cell", quoted())
def test_every_answer_is_to_something_that_is_said(cell):
    parts = [part.strip(" .,:;") for part in cell.split(GAP)]
    assert [part for part in parts if len(part) >= SHORTEST and part.lower() not in said()] == []

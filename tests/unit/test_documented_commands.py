"""Commands in the documentation: each is taken by the parser, the Makefile or the program that it is for."""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from comfyui_agd.training.arguments import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:agd|make|python|torchrun) [^`]+)`")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
OPTION = re.compile(r"^--[a-z-]+")


def fenced(language: str) -> Iterator[tuple[str, str]]:
    """(page, text) of the blocks in that language."""
    for page in PAGES:
        for found, text in FENCED.findall(page.read_text(encoding="utf-8")):
            if found == language:
                yield page.name, text


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every line in a block."""
    for page, text in fenced(""):
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield page, words


def mentions() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every command in the running text, perhaps not all of it."""
    for page in PAGES:
        for text in INLINE.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
            yield page.name, shlex.split(text.replace("...", " ").replace("\\|", "|"))


def _shown(given: str | list[str]) -> str:
    return given if isinstance(given, str) else " ".join(given)


class Taken(Exception):
    """By the program's own parser."""


def check_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `python FILE ...`: its parser takes the arguments."""
    original = argparse.ArgumentParser.parse_args

    def taken(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Taken

    module = importlib.import_module("comfyui_agd." + words[1].removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", taken)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(Taken):
        module.main()


def check_make(words: list[str]) -> None:
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name}\s*[?:]?=" if is_variable else rf"^{name}:", MAKEFILE, re.MULTILINE), word


def check_torchrun(words: list[str]) -> None:
    parse(words[words.index("train") :])


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "agd":
        parse(words[1:])
    elif words[0] == "make":
        check_make(words)
    elif words[0] == "torchrun":
        check_torchrun(words)
    elif words[0] == "python" and words[1].startswith(("benchmarks/", "tools/")):
        check_program(words, monkeypatch)
    else:
        assert words[0] == "echo", f"no test knows {words[0]}"


@pytest.mark.parametrize(("page", "words"), commands(), ids=_shown)
def test_a_command_is_taken(page, words, monkeypatch):
    check(words, monkeypatch)


@pytest.mark.parametrize(("page", "words"), mentions(), ids=_shown)
def test_a_mentioned_command_has_what_is_named(page, words, monkeypatch, capsys):
    if words[0] != "agd":
        if words[0] == "make" or words[1].startswith(("benchmarks/", "tools/")):
            check(words, monkeypatch)
        return
    with pytest.raises(SystemExit):
        parse([words[1], "--help"])
    helped = capsys.readouterr().out
    assert all(option in helped for option in words[2:] if OPTION.match(option))


@pytest.mark.parametrize(("page", "text"), fenced("toml"))
def test_a_config_file_is_taken(page, text, tmp_path):
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    assert parse(["train", "--config", str(tmp_path / "c.toml")]).command == "train"

"""Text of files and prompts on its way to a terminal or a log: it is shown, and does nothing."""

import ast
import io
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from comfyui_agd.agd_core import adapter_file
from comfyui_agd.agd_core.errors import AGDError
from comfyui_agd.agd_core.text import logger, one_line, printable
from comfyui_agd.training import cli

ROOT = Path(__file__).resolve().parents[2]
# Escape sequences, a C1 control, an override of direction, separators, a zero-width space, half of a pair.
HOSTILE = ["\x1b[2J", "\x9b31m", "\x00", "\x07", "\x7f", "\u202e", "\u2066", "\u2028", "\u2029", "\u0085", "\u200b",
           "\ufeff", "\r", "\t", "\ud800"]  # fmt: skip
EVIL = f"<script>alert(1)</script>{''.join(HOSTILE)}\nFAKE: a line of ours"


def is_harmless(text: str) -> bool:
    return text == printable(text) and not any(each[0] in text for each in HOSTILE)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_terminal_would_act_on_is_spelled_out(text):
    assert printable(f"a{text}b") == "a" + text.encode("unicode_escape").decode() + "b"
    printable(text).encode()


def test_line_breaks_are_ours_only_in_a_page():
    assert one_line("a\nb") == r"a\nb"
    assert printable("a\nb\n") == "a\nb\n"


@pytest.mark.parametrize(
    "text", ["a red star", "雪\u3000明り", "café ñ", "🧑\u200d🚀", "می\u200cخواهم", "a\\b <b> & 'c'"]
)
def test_what_people_write_stays(text):
    assert one_line(text) == text


def test_an_error_of_ours_is_one_harmless_line():
    class Refused(AGDError, ValueError):
        pass

    assert is_harmless(str(Refused(EVIL)))
    assert "\n" not in str(Refused(EVIL))
    assert str(Refused("There is no file a.txt.")) == "There is no file a.txt."


def test_a_message_in_the_log_is_one_harmless_line(caplog):
    with caplog.at_level(logging.WARNING):
        logger("comfyui_agd.a_test").warning("AGD: %s is damaged.", EVIL)
    (record,) = caplog.records
    assert is_harmless(record.getMessage())
    assert "\n" not in record.getMessage()


def test_nothing_of_ours_is_printed_or_logged_in_another_way():
    """But for one function each; `tqdm` shows our own words and figures."""
    found = set()
    for file in [*(ROOT / "agd_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py"), *ROOT.glob("training/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "logging.getLogger"):
                found.add((file.name, ast.unparse(node.func)))
    assert found == {("cli.py", "print"), ("text.py", "logging.getLogger")}


@pytest.fixture
def hostile_file(adapter, info, tmp_path) -> Path:
    training = {"prompts": 3, EVIL: EVIL, "config": {"kind": EVIL}}
    whole = EVIL.replace("\ud800", "")  # the file has these as they are, the others as JSON
    base = replace(info.base, family=whole, prediction=whole, fingerprint=EVIL)
    info = replace(info, base=base, unconditional=EVIL, negative_mode=EVIL, training=training)
    return adapter_file.save(tmp_path / "a\x1b[31m\nFAKE: b.safetensors", adapter, info)


def test_a_hostile_file_is_inspected_without_harm(hostile_file, capsys):
    cli.main(["inspect", str(hostile_file)])
    output = "".join(capsys.readouterr())
    assert is_harmless(output)
    assert not any(line.startswith("FAKE") for line in output.splitlines())


@pytest.mark.parametrize("command", ["inspect", "export", "evaluate"])
def test_names_of_files_in_errors_are_harmless(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    more = {
        "inspect": [],
        "export": ["b.safetensors", "--omega", "3"],
        "evaluate": ["--loader", "a:b", "--prompts", "c"],
    }
    assert cli.main([command, "gone\x1b[2J\nFAKE\u202e.safetensors", *more[command]]) == 1
    text = capsys.readouterr().err
    assert is_harmless(text)
    assert text.count("\n") == 1


def test_a_flag_that_is_refused_is_shown_without_harm(capsys):
    with pytest.raises(SystemExit):
        cli.main(["inspect", "a.safetensors", "--no\x1b[2J"])
    assert is_harmless(capsys.readouterr().err)


def test_a_terminal_of_few_characters_gets_the_others_spelled_out(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(["inspect", "雪\ud800.safetensors"]) == 1
    assert rb"There is no adapter file \u96ea\ud800.safetensors" in stream.buffer.getvalue()

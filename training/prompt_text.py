"""Lines of text with their numbers: read from files, fields and arguments, and cleaned of what no prompt holds."""

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..agd_core.errors import AGDError

# The ends of lines that editors count. Line separators of other kinds come with pasted text, inside of a prompt.
LINE_END = re.compile(r"\r\n|\r|\n")
CONTROL = re.compile("[\x01-\x1f\x7f-\x9f\u2028\u2029]")
UNREADABLE = re.compile("[\x00\ud800-\udfff]")
BYTE_ORDER_MARK = "\ufeff"
# Of ComfyUI's text fields, where it isn't part of an address (https://) or a name (.hack//sign).
COMMENT = re.compile(r"(?:^|(?<=\s))//.*")


class PromptError(AGDError, ValueError):
    """Prompts that can't be read or expanded; the message is meant for the user as it is."""


@dataclass(frozen=True)
class PromptLine:
    """A line of a text, and where it stands: its number, from 1, in `source` ("the prompts", a file's path).

    As a string it is how errors call it.
    """

    text: str
    number: int
    source: str

    def __str__(self) -> str:
        return f'line {self.number} of {shown(self.source, 1000)} ("{shown(self.text)}")'


def shown(text: str, most: int = 200) -> str:
    """`text` for an error message: not too long, and without what can't be written to a terminal."""
    text = CONTROL.sub(" ", text[:most]) + ("..." if len(text) > most else "")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def numbered(texts: Iterable[str], source: str) -> list[PromptLine]:
    """Texts of one line each as lines of `source`, cleaned.

    Byte order marks are taken out, and control characters and line separators are spaces. Raises PromptError on
    characters that no encoding has: NUL and lone surrogates.
    """
    return [_cleaned(PromptLine(text, number, source)) for number, text in enumerate(texts, 1)]


def _cleaned(line: PromptLine) -> PromptLine:
    if found := UNREADABLE.search(line.text):
        raise PromptError(
            f"The character U+{ord(found[0]):04X} can't be part of a prompt, but is in {line}; it comes from text in "
            "another encoding: save it as UTF-8, or type it anew."
        )
    return PromptLine(CONTROL.sub(" ", line.text.replace(BYTE_ORDER_MARK, "")), line.number, line.source)


def prompts_of(text: str, source: str) -> list[PromptLine]:
    """The prompts of a text, one per line: without blank lines, and comments, which begin a line with # or //.

    After a space // begins a comment too, as in ComfyUI's text fields. Raises PromptError as `numbered`.
    """
    lines = [
        PromptLine(COMMENT.sub("", line.text).strip(), line.number, source)
        for line in numbered(LINE_END.split(text), source)
    ]
    return [line for line in lines if line.text and not line.text.startswith("#")]


def read_prompts(path: str | Path) -> list[PromptLine]:
    """The prompts of a text file (see `prompts_of`), in UTF-8, or in UTF-16 with a byte order mark.

    Raises PromptError where there is no such file, where its encoding is another, and where it holds no prompts.
    """
    prompts = prompts_of(_read_text(Path(path)), str(path))
    if not prompts:
        raise PromptError(f"{path} holds no prompts; write one per line (lines that start with # don't count).")
    return prompts


def read_verbatim(path: str | Path) -> list[str]:
    """Every line of a text file as it is, but for characters that no prompt holds (see `numbered`).

    Raises PromptError as `read_prompts`.
    """
    lines = LINE_END.split(_read_text(Path(path)))
    texts = [line.text for line in numbered(lines if lines[-1] else lines[:-1], str(path))]
    if not texts:
        raise PromptError(f"{path} holds no prompts; write one per line.")
    return texts


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise PromptError(f"{path} is a folder; give the text file with the prompts, one per line.")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PromptError(f"There is no file {path}; give a text file with one prompt per line.") from error
    except OSError as error:
        raise PromptError(f"{path} can't be read ({error.strerror}); give a text file that can.") from error
    encoding = "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "UTF-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        place = f"byte {error.start}, {data[error.start]:#04x}, in line {line}"
        raise PromptError(f"{path} is not {encoding} text ({place}); save it as UTF-8.") from error

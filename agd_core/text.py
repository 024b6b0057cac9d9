"""Text from files and prompts on its way to people: what a terminal or an editor would act on is shown, not done.

Escape sequences, directional overrides, invisible characters and halves of surrogate pairs are spelled out ("\\x1b").
"""

import logging
import unicodedata
from collections.abc import Sequence

# Control and format characters, surrogates, separators of lines and paragraphs.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # parts of words in some scripts, and of emoji


def one_line(text: object) -> str:
    """Text that is part of a line: line breaks are spelled out too, so that it can't look like lines of ours."""
    return "".join(_spelled_out(each) if _is_unseen(each) else each for each in str(text))


def printable(text: object) -> str:
    """Text of several lines, whose breaks are ours."""
    return "\n".join(map(one_line, str(text).split("\n")))


def first_of(phrases: Sequence[str], most: int = 8, separator: str = "; ") -> str:
    """So many of them in full, and how many more there are."""
    more = f" and {len(phrases) - most} more" if len(phrases) > most else ""
    return separator.join(phrases[:most]) + more


def _is_unseen(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN and character not in _JOINERS


def _spelled_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class _OneLine(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = one_line(record.getMessage()), ()
        return True


def logger(name: str) -> logging.Logger:
    """The logger of a module of ours: a message is one line."""
    found = logging.getLogger(name)
    found.addFilter(_ONE_LINE)
    return found


_ONE_LINE = _OneLine()

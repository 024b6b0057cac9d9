"""The syntax of wildcards: a line is read once, into parts that prompts are drawn from.

| written | is |
| --- | --- |
| `{red|blue|dark {green|grey}}` | one of its alternatives; `{3::red|blue}` is red three times as often as blue |
| `{2$$a|b|c}` | two different ones, with a comma between them; `{1-3$$ and $$a|b|c}` one to three, with " and " |
| `{2$$__animal__}` | two different lines of a list |
| `__animals/birds__` | a line of the list `animals/birds` |
| `__animals/*__` | a line of any list whose name fits; `*` stands for any characters, `?` for one |
| `${v={red|blue}}` | nothing; after it `${v}` is red or blue, drawn anew at each use. `${v=!...}` is drawn once |
| `${v:blue}` | what v was set to, else blue. `${v?=blue}` sets v only if nothing else did |
| `\\{`, `\\__`, `\\::` | the characters themselves |

This is what dynamicprompts and the Impact Pack have in common, but for YAML. What they understand and we don't, and
what nobody could (a brace without a partner), is refused: prompts are trained on, and nobody reads all of them.
That is also why this isn't the dynamicprompts package, which ComfyUI doesn't bring either: it leaves unknown lists and
a lone `}` in the prompt, has no weights in text files, and answers deep nesting with a RecursionError.

All else is the prompt's own, ComfyUI's `(word:1.2)` and `embedding:name` among it.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

from .prompt_text import PromptError, PromptLine, shown

# Braces in braces, and lists that lead to lists.
MOST_NESTED = 50
_NUMBER = r"\d{1,9}"
_COUNT = rf"(?:(?P<exactly>{_NUMBER})|(?P<least>{_NUMBER})\s*-\s*(?P<most>{_NUMBER})?|-\s*(?P<up_to>{_NUMBER}))"
# Text, or a bar alone.
_SEPARATOR = r"(?:(?!__)[^${}|\\])*|\s*\|\s*"
TOKEN = re.compile(
    r"(?P<escaped>\\(?:__+|\$+|::|//|/\*|\*/|[{}|#~!@%]))"
    # Names of files, in which underscores are ordinary.
    r"|(?P<file_name>\b(?:embedding|lora):[^\W_][\w./-]*)"
    r"|(?P<foreign>\{%|/\*|\*/|\d\#(?=__)|\{\s*[~!@])"
    r"|(?P<variable>\$\{\s*(?P<name>[^\W\d][\w-]*)\s*(?:(?P<sign>\?=|=!?|:)\s*|(?=\})))"
    rf"|(?P<choice>\{{(?:\s*{_COUNT}\s*\$\$(?:(?P<separator>{_SEPARATOR})\$\$)?)?)"
    r"|(?P<close>\})"
    r"|(?P<bar>\|)"
    r"|(?P<weight>::)"
    r"|__(?P<list>(?:(?!__)[^{}|$\\])+)__"
    r"|(?P<stray>\$\{|__|\$\$)"
)
WEIGHT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*")
# What stands before :: in text: a word, or what has a bracket, as [from::0.5].
WORDS = re.compile(r"\s*(?:[^\W\d]|[\[(<])")
_COMMENT = "A comment between /* and */ isn't understood", r"take it out, put it after //, or write \/* and \*/"
_SAMPLER = "A sampler (~, ! or @) isn't understood", r"take it out (all is drawn at random), or write \~, \! or \@"
# By the last character of the token: what was found, and what to do.
FOREIGN = {
    "%": ("A Jinja template isn't understood", r"take it out, or write \{%"),
    "#": (
        "A list with a number of times (3#__list__) isn't understood",
        r"write {3$$__list__}, or \# for the character",
    ),
    **dict.fromkeys("*/", _COMMENT),
    **dict.fromkeys("~!@", _SAMPLER),
}


@dataclass(frozen=True)
class ListName:
    """`__name__`."""

    name: str


@dataclass(frozen=True)
class Choice:
    """`{...|...}`: the alternatives, each a list of parts, and how often each is chosen.

    `cumulative`: the weights, summed up; `count`: the least and the most that are chosen, or None for one, always.
    """

    alternatives: list[list]
    weights: list[float]
    cumulative: list[float]
    count: tuple[int, int] | None
    separator: str


@dataclass(frozen=True)
class Assignment:
    """`${name=value}`: `once`: drawn where it stands, not where it is used; `keeps`: a value that was set before."""

    name: str
    value: list
    once: bool
    keeps: bool


@dataclass(frozen=True)
class Variable:
    """`${name}` or `${name:default}`."""

    name: str
    default: list | None


@dataclass(frozen=True)
class Template:
    """A line that was read: its parts, each a str, ListName, Choice, Variable or Assignment.

    `weight`: how often it is drawn from its list, or None where it doesn't say.
    """

    line: PromptLine
    parts: list
    weight: float | None


@dataclass
class _Open:
    """A brace that is not closed yet, or the line itself; the last of its alternatives is growing.

    `finish`: makes the part of it. `has_alternatives`, `has_weights`: whether `|` and `3::` mean something in it.
    """

    finish: Callable[["_Open"], object]
    has_alternatives: bool
    has_weights: bool
    alternatives: list[list] = field(default_factory=lambda: [[]])
    weights: list[float | None] = field(default_factory=lambda: [None])


def parse(line: PromptLine) -> Template:
    """The parts of a line. Raises PromptError, which names the line, on what can't be understood."""
    parser, position = _Parser(line), 0
    for token in TOKEN.finditer(line.text):
        parser.add(line.text[position : token.start()])
        parser.read(token)
        position = token.end()
    parser.add(line.text[position:])
    return parser.finished()


def references(part: object) -> Iterator[ListName | Variable]:
    """The lists and variables that a part uses, in its alternatives, values and defaults too."""
    if isinstance(part, ListName | Variable):
        yield part
    for parts in _inside(part):
        for each in parts:
            yield from references(each)


def _inside(part: object) -> list[list]:
    if isinstance(part, Choice):
        return part.alternatives
    if isinstance(part, Assignment):
        return [part.value]
    return [part.default] if isinstance(part, Variable) and part.default is not None else []


class _Parser:
    """Reads the tokens of one line; a method per kind of token."""

    def __init__(self, line: PromptLine):
        self.line = line
        self.open = [_Open(self.template, has_alternatives=False, has_weights=True)]

    def refuse(self, found: str, remedy: str) -> PromptError:
        return PromptError(f"{found} in {self.line}; {remedy}.")

    def add(self, part: object) -> None:
        if part != "":
            self.open[-1].alternatives[-1].append(part)

    def read(self, token: re.Match) -> None:
        HANDLERS[token.lastgroup or ""](self, token)

    def escaped(self, token: re.Match) -> None:
        self.add(token[0][1:])

    def text(self, token: re.Match) -> None:
        self.add(token[0])

    def foreign(self, token: re.Match) -> None:
        raise self.refuse(*FOREIGN[token[0][-1]])

    def stray(self, token: re.Match) -> None:
        if token[0] == "__":
            raise self.refuse("Two underscores that don't make a list (__name__)", r"write \__ for the characters")
        if token[0] == "${":
            raise self.refuse("A ${ that doesn't begin a variable (${name})", r"write \$ for the character itself")
        raise self.refuse("A $$ that isn't after a count ({2$$a|b})", r"write \$$ for the characters")

    def list_name(self, token: re.Match) -> None:
        name = token["list"]
        if name[0] in "~!@":
            raise self.refuse(*_SAMPLER)
        if name != name.strip():
            raise self.refuse("Two underscores with a space after them", r"write __name__ for a list, else \__")
        if "(" in name and "=" in name:
            raise self.refuse(f"A list with values for variables (__{shown(name)}__)", "set them before: ${v=red}")
        self.add(ListName(name))

    def begin(self, opened: _Open) -> None:
        if len(self.open) > MOST_NESTED:
            raise self.refuse(f"There are braces in braces, more than {MOST_NESTED} deep,", "make lists of them")
        self.open.append(opened)

    def begin_choice(self, token: re.Match) -> None:
        self.begin(_Open(partial(self.choice, token), has_alternatives=True, has_weights=True))

    def begin_variable(self, token: re.Match) -> None:
        if "=" in (token["sign"] or "") and len(self.open) > 1:
            raise self.refuse(f"A variable is set inside of braces ({shown(token[0])}...)", "set it before them")
        self.begin(_Open(partial(self.variable, token), has_alternatives=False, has_weights=False))

    def next_alternative(self, token: re.Match) -> None:
        top = self.open[-1]
        if top.has_alternatives:
            top.alternatives.append([])
            top.weights.append(None)
        elif len(self.open) == 1:
            self.add(token[0])
        else:
            raise self.refuse("A | stands in a variable without braces of its own", "write {a|b} in it")

    def weigh(self, token: re.Match) -> None:
        """`::`, which makes a weight of a number before it."""
        top = self.open[-1]
        head = top.alternatives[-1]
        before = head[0] if head and isinstance(head[0], str) else ""
        number = WEIGHT.fullmatch(before)
        if number and len(head) == 1 and top.has_weights and top.weights[-1] is None:
            top.weights[-1] = float(number[1])
            head.clear()
        elif WORDS.match(before):
            self.add(token[0])
        else:
            raise self.refuse("A :: is not after a weight", r"write {3::red|blue}, or \:: for the characters")

    def close(self, token: re.Match) -> None:
        if len(self.open) == 1:
            raise self.refuse("A } has no {", r"add it, or write \} for the character itself")
        closed = self.open.pop()
        self.add(closed.finish(closed))

    def choice(self, token: re.Match, closed: _Open) -> Choice:
        weights = [1.0 if weight is None else weight for weight in closed.weights]
        if not any(weights):
            raise self.refuse("All weights of a choice are 0", "give one of them more than 0")
        cumulative = list(accumulate(weights))
        if math.isinf(cumulative[-1]):
            raise self.refuse("The weights of a choice are far too large", "give it smaller ones")
        separator = ", " if token["separator"] is None else token["separator"]
        return Choice(closed.alternatives, weights, cumulative, self.count(token), separator)

    def count(self, token: re.Match) -> tuple[int, int] | None:
        if not (token["exactly"] or token["least"] or token["up_to"]):
            return None
        least = int(token["exactly"] or token["least"] or 1)
        most = int(token["exactly"] or token["most"] or token["up_to"] or 10**9)
        if least > most:
            raise self.refuse(f"A count goes from {least} to {most}", "write the smaller number first")
        return least, most

    def variable(self, token: re.Match, closed: _Open) -> Assignment | Variable:
        value, sign = closed.alternatives[0], token["sign"] or ""
        # The spaces before the value are part of the token.
        value[-1:] = [part.rstrip() if isinstance(part, str) else part for part in value[-1:]]
        if "=" in sign:
            return Assignment(token["name"], value, once=sign == "=!", keeps=sign == "?=")
        return Variable(token["name"], value if sign else None)

    def template(self, line: _Open) -> Template:
        weight = line.weights[0]
        if weight is not None and math.isinf(weight):
            raise self.refuse("A weight is far too large", "give it a smaller one")
        return Template(self.line, line.alternatives[0], weight)

    def finished(self) -> Template:
        if len(self.open) > 1:
            raise self.refuse("A { has no }", r"add it (a prompt is one line), or write \{ for the character itself")
        return self.template(self.open[0])


HANDLERS = {
    "escaped": _Parser.escaped,
    "file_name": _Parser.text,
    "foreign": _Parser.foreign,
    "variable": _Parser.begin_variable,
    "choice": _Parser.begin_choice,
    "close": _Parser.close,
    "bar": _Parser.next_alternative,
    "weight": _Parser.weigh,
    "list": _Parser.list_name,
    "stray": _Parser.stray,
}

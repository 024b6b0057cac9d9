"""Where training prompts and negative prompts come from: a file, wildcards, or the built-in generator.

The syntax of wildcards, for files and for the built-in lists alike:

- `{red|blue|dark {green|grey}}` is one of its alternatives; `{3::red|blue}` is red three times as often as blue.
- `__animals/birds__` is a line of the list `animals/birds`: the file animals/birds.txt in the user's folder, or
  else the built-in list of that name. Lines of lists may hold alternatives and other lists.
- A backslash before a brace or a bar makes it an ordinary character.

All else is the prompt's own, ComfyUI's `(word:1.2)` and `embedding:name` among it. Underscores that touch a letter
or a digit on their left (`my__style__v2`) are ordinary characters too: such names are of embeddings, not of lists.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..agd_core.errors import AGDError
from .prompt_lists import BUILT_IN

TOKEN = re.compile(r"(\\[{}|]|[{}|]|(?<![^\W_])__[A-Za-z0-9][A-Za-z0-9-]*(?:[_/][A-Za-z0-9-]+)*__)")
WEIGHT = re.compile(r"\s*(\d+(?:\.\d+)?)::")
# A line that gave nothing new so many times in a row is taken to have given all it has.
PATIENCE = 200
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class PromptError(AGDError, ValueError):
    """Prompts that can't be read or expanded; the message is meant for the user as it is."""


def prompts_of(text: str) -> list[str]:
    """The prompts of a text, one per line; blank lines and lines that start with # are left out."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read_prompts(path: str | Path, *, verbatim: bool = False) -> list[str]:
    """The prompts of a UTF-8 text file, with or without a byte order mark; see `prompts_of`. `verbatim`: every line.

    Raises PromptError where there is no such file, where it is not UTF-8, and where it holds no prompts.
    """
    path = Path(path)
    text = _read_text(path)
    prompts = text.splitlines() if verbatim else prompts_of(text)
    if not prompts:
        raise PromptError(f"{path} holds no prompts; write one per line (lines that start with # don't count).")
    return prompts


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise PromptError(f"{path} is a folder; give the text file with the prompts, one per line.")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PromptError(f"There is no file {path}; give a text file with one prompt per line.") from error
    except OSError as error:
        raise PromptError(f"{path} can't be read ({error.strerror}); give a text file that can.") from error
    try:
        return data.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(_not_utf8(path, data, error)) from error


def _not_utf8(path: Path, data: bytes, error: UnicodeDecodeError) -> str:
    position = error.start + len(data) - len(error.object)
    line = data[:position].count(b"\n") + 1
    return f"{path} is not UTF-8 text (byte {position}, {data[position]:#04x}, in line {line}); save it as UTF-8."


@dataclass(frozen=True)
class _List:
    """`__name__`."""

    name: str


@dataclass(frozen=True)
class _Choice:
    """`{...|...}`: the alternatives, each a parsed text, and how often each is chosen."""

    alternatives: list[list]
    weights: list[float]


def _parse(line: str, where: str) -> list:
    """A line, which errors call `where`, as a list of str, _List and _Choice. Raises PromptError on lone braces."""
    # One entry per open brace, and the line itself at the bottom: the alternatives so far, the last one growing.
    stack: list[list[list]] = [[[]]]
    for token in filter(None, TOKEN.split(line)):
        if token == "{":
            stack.append([[]])
        elif token == "|" and len(stack) > 1:
            stack[-1].append([])
        elif token == "}":
            alternatives = stack.pop()
            if not stack:
                raise PromptError(_unbalanced("}", "{", where))
            stack[-1][-1].append(_choice(alternatives, where))
        else:
            stack[-1][-1].append(_plain(token))
    if len(stack) > 1:
        raise PromptError(_unbalanced("{", "}", where))
    return stack[0][0]


def _unbalanced(found: str, missing: str, where: str) -> str:
    return f"A {found} has no {missing} in {where}; add it, or write \\{found} for the character itself."


def _where(line: str, name: str = "") -> str:
    """How errors call a line, of the list `name` if given."""
    return f'the line "{line[:200]}{"..." if len(line) > 200 else ""}"' + (f" of the list {name}" if name else "")


def _plain(token: str) -> str | _List:
    if token[0] == "\\" and len(token) == 2 and token[1] in "{}|":
        return token[1]
    # The only other tokens that match are names of lists: bare braces were dealt with, a bar outside braces is text.
    return _List(token[2:-2]) if TOKEN.fullmatch(token) and token != "|" else token


def _choice(alternatives: list[list], where: str) -> _Choice:
    weights = []
    for alternative in alternatives:
        head = alternative[0] if alternative and isinstance(alternative[0], str) else ""
        weight = WEIGHT.match(head)
        weights.append(float(weight[1]) if weight else 1.0)
        if weight:
            alternative[0] = head[weight.end() :]
    if not any(weights):
        raise PromptError(f"All weights of a choice are 0 in {where}; give one of them more than 0.")
    return _Choice(alternatives, weights)


def _names(text: list) -> list[str]:
    """The lists that a parsed text refers to, in its choices too."""
    found = [part.name for part in text if isinstance(part, _List)]
    choices = [part for part in text if isinstance(part, _Choice)]
    return found + [name for choice in choices for alternative in choice.alternatives for name in _names(alternative)]


class _Lists:
    """The lists by name, each read and parsed once: the user's folder first, then the built-in ones."""

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder) if folder else None
        if self.folder and not self.folder.is_dir():
            raise PromptError(f"There is no folder {folder}; give the folder with the wildcard lists (*.txt), or none.")
        self.texts: dict[str, list[list]] = {}

    def check(self, text: list, where: str, chain: tuple[str, ...] = ()) -> None:
        """Reads all lists that a parsed text can come to; `chain` are the lists that led to it.

        Raises PromptError on unknown lists, and on lists that come back to themselves, which might never end.
        """
        for name in _names(text):
            if name in chain:
                circle = " -> ".join([*chain[chain.index(name) :], name])
                raise PromptError(f"The wildcard lists go in circles ({circle}) in {where}; take one link out.")
            if name not in self.texts:
                # Kept only when checked, so that a circle is not taken for a list that is known.
                self.texts[name] = [self._line(line, name, (*chain, name)) for line in self._read(name, where)]

    def _line(self, line: str, name: str, chain: tuple[str, ...]) -> list:
        where = _where(line, name)
        text = _parse(line, where)
        self.check(text, where, chain)
        return text

    def _read(self, name: str, where: str) -> Sequence[str]:
        if self.folder and (self.folder / f"{name}.txt").is_file():
            return read_prompts(self.folder / f"{name}.txt")
        if name in BUILT_IN:
            return BUILT_IN[name]
        folder = f"{self.folder} has {_some(self._files())}" if self.folder else "No folder with lists was given"
        raise PromptError(
            f"There is no wildcard list {name} for {where}; correct the name or add {name}.txt. "
            f"{folder}; built in are {_some(sorted(BUILT_IN))}."
        )

    def _files(self) -> list[str]:
        if self.folder is None:
            return []
        return sorted(file.relative_to(self.folder).with_suffix("").as_posix() for file in self.folder.rglob("*.txt"))


def _some(names: list[str], most: int = 40) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "no lists") + more


def _draw(text: list, lists: _Lists, rng: random.Random) -> str:
    """One expansion of a parsed text whose lists were checked."""
    drawn = []
    for part in text:
        if isinstance(part, _Choice):
            part = _draw(rng.choices(part.alternatives, part.weights)[0], lists, rng)
        elif isinstance(part, _List):
            part = _draw(rng.choices(lists.texts[part.name])[0], lists, rng)
        drawn.append(part)
    return "".join(drawn)


def _tidy(prompt: str) -> str:
    """Takes away the spaces and commas that empty alternatives leave behind."""
    prompt = re.sub(r"\s+", " ", prompt)
    prompt = re.sub(r" ?,( ?,)+", ",", prompt)
    return re.sub(r" (?=[,.](?:\s|$))", "", prompt).strip(" ,")


class _Line:
    """A line to draw prompts from; one without wildcards always gives itself."""

    def __init__(self, line: str, lists: _Lists):
        self.text, self.lists = _parse(line, _where(line)), lists
        lists.check(self.text, _where(line))
        self.fixed = all(isinstance(part, str) for part in self.text)
        self.misses = 0

    def draw(self, rng: random.Random) -> str:
        return "".join(self.text) if self.fixed else _tidy(_draw(self.text, self.lists, rng))

    def add(self, prompts: dict[str, None], rng: random.Random) -> None:
        """Draws once into `prompts`; what is there already, or empty, counts as a miss."""
        prompt = self.draw(rng)
        new = bool(prompt) and prompt not in prompts
        self.misses = 0 if new else self.misses + 1
        if new:
            prompts[prompt] = None

    @property
    def gives_more(self) -> bool:
        return not self.fixed and self.misses < PATIENCE


def expand(lines: Sequence[str], count: int, seed: int, folder: str | Path | None = None) -> list[str]:
    """The distinct prompts that `lines` give: each line once, in order, then those with wildcards in turn again.

    Ends at `count` prompts, though no line is left out for it, and earlier where no more of them can be found.
    The same arguments and the same files in `folder`, the user's wildcard lists, give the same prompts.
    Raises PromptError on braces without a partner, unknown lists and lists that go in circles, drawn or not.
    """
    lists, rng = _Lists(folder), random.Random(seed)
    turns = [_Line(line, lists) for line in lines]
    prompts: dict[str, None] = {}
    for line in turns:
        line.add(prompts, rng)
    while turns := [line for line in turns if line.gives_more]:
        for line in turns:
            if len(prompts) >= count:
                return list(prompts)
            line.add(prompts, rng)
    return list(prompts)


def generate(count: int, seed: int) -> list[str]:
    """`count` distinct prompts of the built-in lists, of many kinds and lengths. More of them begin with the same."""
    return expand(["__prompt__"], count, seed)[:count]


def generate_negatives(count: int, seed: int) -> list[str]:
    """`count` negative prompts in random order: half of them drawn from the built-in lists, the others empty."""
    rng, line = random.Random(seed), _Line("__negative__", _Lists(None))
    negatives = [line.draw(rng) for _ in range(count // 2)] + [""] * (count - count // 2)
    rng.shuffle(negatives)
    return negatives


def fragments(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` negative prompts made of parts of prompts: what stands between two commas, or up to four words of it."""
    rng, found = random.Random(seed), []
    parts = [part for prompt in prompts for part in map(str.strip, prompt.split(",")) if part]
    for _ in range(count if parts else 0):
        words = rng.choice(parts).split()
        if rng.random() < 0.5:
            first = rng.randrange(len(words))
            words = words[first : first + rng.randint(1, 4)]
        found.append(" ".join(words))
    return found

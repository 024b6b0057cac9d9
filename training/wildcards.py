"""The lists that prompts draw from, and the drawing. The syntax is that of prompt_syntax.py."""

import math
import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path

from ..agd_core.text import first_of
from .prompt_lists import BUILT_IN
from .prompt_syntax import MOST_NESTED, Assignment, Choice, ListName, Template, Variable, parse, references
from .prompt_text import PromptError, PromptLine, numbered, read_prompts, shown

# Characters of a prompt, and choices made for it: lists that draw others many times over would hardly end.
MOST_DRAWN = 20_000


@dataclass(frozen=True)
class WildcardList:
    """What a list's name stands for.

    `weights`: how often each line is drawn, summed up to it; `needs`: the variables that its lines don't set
    themselves, each with a line that uses it.
    """

    templates: list[Template]
    weights: list[float]
    needs: dict[str, PromptLine]


class Lists:
    """The lists by name, each read once: text files in the user's folder and its subfolders, then the built-in ones.

    Files are looked up among those in the folder, never by joining a name to its path: no name leads out of it.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = Path(folder) if folder else None
        if self.folder and not self.folder.is_dir():
            raise PromptError(f"There is no folder {folder}; give the folder with the wildcard lists (*.txt), or none.")
        self.files = self._files("*.txt")
        self.loaded: dict[str, WildcardList] = {}

    def _files(self, *patterns: str) -> dict[str, Path]:
        """Files of the folder by their paths in it, without the ending."""
        if self.folder is None:
            return {}
        found = sorted(path for pattern in patterns for path in self.folder.rglob(pattern) if path.is_file())
        return {_normal(path.relative_to(self.folder).with_suffix("").as_posix()): path for path in found}

    def check(self, template: Template) -> None:
        """Reads all lists that a prompt's line can come to, drawn or not.

        Raises PromptError on unknown lists and variables, on a weight, and on lists that come back to themselves,
        which might never end.
        """
        if template.weight is not None:
            raise PromptError(
                f"A weight stands before a prompt in {template.line}; only alternatives and lines of lists have one: "
                r"take it out, or write \:: for the characters."
            )
        for name, line in self._needs(template, ()).items():
            raise PromptError(
                f"The variable {shown(name)} has no value in {line}; set it before it is used (${{name=red}}), "
                "or give it a default there (${name:red})."
            )

    def _needs(self, template: Template, chain: tuple[str, ...]) -> dict[str, PromptLine]:
        """The variables that a line uses and doesn't set before; `chain` are the lists that led to it."""
        needs: dict[str, PromptLine] = {}
        known: set[str] = set()
        for part in template.parts:
            for reference in references(part):
                wanted = self._wanted(reference, template.line, chain)
                needs |= {name: line for name, line in wanted.items() if name not in known}
            if isinstance(part, Assignment):
                known.add(part.name)
        return needs

    def _wanted(self, part: ListName | Variable, line: PromptLine, chain: tuple[str, ...]) -> dict[str, PromptLine]:
        if isinstance(part, ListName):
            return self._load(part.name, line, chain).needs
        return {part.name: line} if part.default is None else {}

    def _load(self, name: str, line: PromptLine, chain: tuple[str, ...]) -> WildcardList:
        if name not in self.loaded:
            # Kept only when checked, so that a circle is not taken for a list that is known.
            members = self._names(name, line)
            is_one = members == [name]
            self.loaded[name] = self._read(name, line, chain) if is_one else self._union(name, members, line, chain)
        return self.loaded[name]

    def _union(self, name: str, members: list[str], line: PromptLine, chain: tuple[str, ...]) -> WildcardList:
        lists = [self._load(member, line, chain) for member in members]
        needs = {needed: where for each in lists for needed, where in each.needs.items()}
        return _list_of(name, [template for each in lists for template in each.templates], needs)

    def _read(self, name: str, line: PromptLine, chain: tuple[str, ...]) -> WildcardList:
        _check_chain(name, chain, line)
        templates = [parse(each) for each in self._lines(name)]
        needs: dict[str, PromptLine] = {}
        for template in templates:
            needs |= self._needs(template, (*chain, name))
        return _list_of(name, templates, needs)

    def _lines(self, name: str) -> Sequence[PromptLine]:
        if name not in self.files:
            return numbered(BUILT_IN[name], f"the built-in list {name}")
        file = self.files[name]
        if self.folder and not file.resolve().is_relative_to(self.folder.resolve()):
            raise PromptError(f"{file} leads out of the folder of wildcard lists ({file.resolve()}); put a copy there.")
        return read_prompts(file)

    def _names(self, name: str, line: PromptLine) -> list[str]:
        """The lists that a name in `line` stands for: its own, or those that fit it as a pattern.

        A name that isn't known may be that of files in subfolders, as in other packs.
        """
        wanted = _normal(name)
        is_pattern = "*" in name or "?" in name
        if not is_pattern and (wanted in self.files or wanted in BUILT_IN):
            return [wanted]
        pattern = (wanted if is_pattern else f"*/{wanted}").replace("[", "[[]")
        found = [each for each in self.files if fnmatchcase(each, pattern)]
        found = found or [each for each in BUILT_IN if fnmatchcase(each, pattern)]
        if not found:
            raise PromptError(self._unknown(name, line))
        return found

    def _unknown(self, name: str, line: PromptLine) -> str:
        folder = (
            f"{shown(str(self.folder))} has {_some(self.files)}" if self.folder else "No folder with lists was given"
        )
        others = self._files("*.yaml", "*.yml", "*.json")
        unread = f" Lists in YAML and JSON aren't read ({_some(others)}); write each as a text file." if others else ""
        return (
            f"There is no wildcard list {shown(name)} for {line}; correct the name, add a file for it, or write "
            f"\\__ for the characters. {folder}; built in are {_some(sorted(BUILT_IN))}.{unread}"
        )


def _normal(name: str) -> str:
    """A name in one of the forms that its letters have: macOS writes accents as characters of their own."""
    return unicodedata.normalize("NFC", name)


def _some(names: Sequence[str] | dict[str, Path], most: int = 40) -> str:
    return first_of([shown(name) for name in names], most, ", ") or "no lists"


def _check_chain(name: str, chain: tuple[str, ...], line: PromptLine) -> None:
    if name in chain:
        circle = " -> ".join(shown(each) for each in [*chain[chain.index(name) :], name])
        raise PromptError(f"The wildcard lists go in circles ({circle}) in {line}; take one link out.")
    if len(chain) >= MOST_NESTED:
        raise PromptError(f"Lists lead to lists, more than {MOST_NESTED} deep, in {line}; put some of them together.")


def _list_of(name: str, templates: list[Template], needs: dict[str, PromptLine]) -> WildcardList:
    weights = list(accumulate(1.0 if template.weight is None else template.weight for template in templates))
    if not 0 < weights[-1] < math.inf:
        raise PromptError(
            f"The weights of the list {shown(name)} are {weights[-1]:g} together; give a line of it more than 0, and "
            f"none too much ({templates[0].line} is its first)."
        )
    return WildcardList(templates, weights, needs)


@dataclass(frozen=True)
class _Set:
    """A variable's value, the ones set before it, which its value may use, and how they are looked up."""

    name: str
    value: list
    before: "_Set | None"


@dataclass
class _Text:
    """A text that is being drawn: its parts to come, and the variables that it knows."""

    parts: Iterator
    known: _Set | None


class Drawing:
    """One prompt that is being drawn from a line that `lists` checked."""

    def __init__(self, template: Template, lists: Lists, rng: random.Random):
        self.template, self.lists, self.rng = template, lists, rng
        self.left = MOST_DRAWN

    def text(self) -> str:
        """The prompt. Raises PromptError where it takes too much."""
        return self._draw(self.template.parts, None)

    def _draw(self, parts: list, known: _Set | None) -> str:
        # No recursion but for values drawn once: lists and braces may be nested deeper together than Python's stack.
        drawn, open_texts = [], [_Text(iter(parts), known)]
        while open_texts:
            text = open_texts[-1]
            part = next(text.parts, None)
            self._spend(part)
            if part is None:
                open_texts.pop()
            elif isinstance(part, str):
                drawn.append(part)
            elif isinstance(part, Assignment):
                text.known = self._set(part, text.known)
            else:
                open_texts.append(self._chosen(part, text.known))
        return "".join(drawn)

    def _spend(self, part: object) -> None:
        self.left -= len(part) if isinstance(part, str) else 1
        if self.left < 0:
            raise PromptError(
                f"A prompt takes more than {MOST_DRAWN} characters and choices in {self.template.line}; shorten it, or "
                "take out lists that draw other lists many times over."
            )

    def _chosen(self, part: Choice | ListName | Variable, known: _Set | None) -> _Text:
        if isinstance(part, Choice):
            return _Text(iter(self._choose(part)), known)
        if isinstance(part, ListName):
            return _Text(iter(self._line(self.lists.loaded[part.name]).parts), known)
        found = _find(part.name, known)
        return _Text(iter(found.value), found.before) if found else _Text(iter(part.default or ()), known)

    def _line(self, found: WildcardList) -> Template:
        return self.rng.choices(found.templates, cum_weights=found.weights)[0]

    def _choose(self, choice: Choice) -> list:
        if choice.count is None:
            return self.rng.choices(choice.alternatives, cum_weights=choice.cumulative)[0]
        alternatives, weights = self._to_choose_from(choice)
        # Smallest first, these are the order of drawing one after the other without putting any back.
        times = {i: self.rng.expovariate(weight) for i, weight in enumerate(weights) if weight}
        least, most = (min(count, len(times)) for count in choice.count)
        chosen = sorted(times, key=times.__getitem__)[: self.rng.randint(least, most)]
        parts = [part for i in chosen for part in (choice.separator, *alternatives[i])]
        return parts[1:]

    def _to_choose_from(self, choice: Choice) -> tuple[list[list], list[float]]:
        """The alternatives, or the lines of the list that is the only one."""
        only = choice.alternatives[0]
        if len(choice.alternatives) > 1 or len(only) != 1 or not isinstance(only[0], ListName):
            return choice.alternatives, choice.weights
        templates = self.lists.loaded[only[0].name].templates
        return [each.parts for each in templates], [1.0 if each.weight is None else each.weight for each in templates]

    def _set(self, part: Assignment, known: _Set | None) -> _Set | None:
        if part.keeps and _find(part.name, known):
            return known
        value = [self._draw(part.value, known)] if part.once else part.value
        return _Set(part.name, value, known)


def _find(name: str, known: _Set | None) -> _Set | None:
    while known and known.name != name:
        known = known.before
    return known

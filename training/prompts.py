"""Where training prompts and negative prompts come from: a file, wildcards, or the built-in generator.

Texts are read in prompt_text.py, the syntax of wildcards is described in prompt_syntax.py, and lists and drawing are in
wildcards.py.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from .prompt_syntax import parse
from .prompt_text import PromptError, PromptLine, numbered, prompts_of, read_prompts, read_verbatim
from .wildcards import Drawing, Lists

__all__ = [
    "PromptError",
    "PromptLine",
    "draw_each",
    "expand",
    "expand_negatives",
    "fragments",
    "generate",
    "generate_negatives",
    "numbered",
    "prompts_of",
    "read_prompts",
    "read_verbatim",
]

# A line that gave nothing new so many times in a row is taken to have given all it has.
PATIENCE = 200


def _tidy(prompt: str) -> str:
    """Takes away the spaces and commas that empty alternatives leave behind."""
    prompt = re.sub(r"\s+", " ", prompt)
    prompt = re.sub(r" ?,( ?,)+", ",", prompt)
    return re.sub(r" (?=[,.](?:\s|$))", "", prompt).strip(" ,")


class _Line:
    """A line to draw prompts from; one without wildcards always gives itself."""

    def __init__(self, line: PromptLine, lists: Lists):
        self.template, self.lists = parse(line), lists
        lists.check(self.template)
        self.fixed = all(isinstance(part, str) for part in self.template.parts)
        self.misses = 0

    def draw(self, rng: random.Random) -> str:
        text = Drawing(self.template, self.lists, rng).text()
        return text if self.fixed else _tidy(text)

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


def expand(lines: Sequence[PromptLine], count: int, seed: int, folder: str | Path | None = None) -> list[str]:
    """The distinct prompts that `lines` give: each line once, in order, then those with wildcards in turn again.

    Ends at `count` prompts, though no line is left out for it, and earlier where no more of them can be found.
    The same arguments and the same files in `folder`, the user's wildcard lists, give the same prompts.
    Raises PromptError, which names the line, on what can't be understood: syntax, lists and variables, drawn or not;
    on prompts that grow far too long; and where all that is drawn is empty.
    """
    lists, rng = Lists(folder), random.Random(seed)
    turns = [_Line(line, lists) for line in lines]
    prompts: dict[str, None] = {}
    for line in turns:
        line.add(prompts, rng)
    while turns := [line for line in turns if line.gives_more]:
        for line in turns:
            if len(prompts) >= count:
                return list(prompts)
            line.add(prompts, rng)
    if lines and not prompts:
        raise PromptError(f"Every prompt that is drawn is empty, from {lines[0]} on; write what the pictures show.")
    return list(prompts)


def expand_negatives(lines: Sequence[PromptLine], count: int, seed: int, folder: str | Path | None = None) -> list[str]:
    """Negative prompts, as `expand`, but empty ones, which mean something there, stay as often as they are given."""
    empty = [line.text for line in lines if not line.text]
    return empty + expand([line for line in lines if line.text], count, seed, folder)


def draw_each(lines: Sequence[PromptLine], seed: int) -> list[str]:
    """One prompt of each line, in order, empty and repeated ones too. Raises PromptError as `expand`."""
    lists, rng = Lists(None), random.Random(seed)
    return [_Line(line, lists).draw(rng) for line in lines]


def generate(count: int, seed: int) -> list[str]:
    """`count` distinct prompts of the built-in lists, of many kinds and lengths. More of them begin with the same."""
    return expand(numbered(["__prompt__"], "the built-in generator"), count, seed)[:count]


def generate_negatives(count: int, seed: int) -> list[str]:
    """`count` negative prompts in random order: half of them drawn from the built-in lists, the others empty."""
    [template] = numbered(["__negative__"], "the built-in generator")
    rng, line = random.Random(seed), _Line(template, Lists(None))
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

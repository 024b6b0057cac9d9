"""Settings as fields of dataclasses: each declares its help, choices and limits, and is held to them by its name."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, ClassVar, get_args, get_origin

from ..agd_core.checked import Between, OneOf, why_wrong
from ..agd_core.errors import AGDError

Limits = tuple[float, float]


class SettingsError(AGDError, ValueError):
    """Settings that can't work, all of them in one sentence."""


def option(
    default=MISSING,
    help: str = "",
    choices: Collection[str] | None = None,
    *,
    limits: Limits | None = None,
    result: bool = True,
    called: str = "",
) -> Any:
    """A field with what the command line shows for it, and what it may be.

    `limits` of a number: the least and the most it may be. Of a tuple, choices and limits are those of its items; one
    with a default can't be empty. `result`: whether another value gives another adapter. `called`: its name in
    messages, and its flag, if it isn't the field's.
    """
    metadata = {"help": help, "choices": choices, "limits": limits, "result": result, "called": called}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Base of dataclasses whose fields are all `option`s. Raises `SettingsError` naming every value that can't be."""

    refusal: ClassVar[str] = "These settings can't work"

    def __post_init__(self):
        if wrong := list(wrong_values(self)) or list(self.contradictions()):
            raise SettingsError(f"{self.refusal}: {'; '.join(wrong)}.")

    def contradictions(self) -> Iterator[str]:
        """What is wrong with values that may be for themselves, a phrase each."""
        yield from ()


def wrong_values(settings: Settings) -> Iterator[str]:
    """A phrase for each field whose value its `option` doesn't allow. Infinity and NaN are in no limits."""
    for f in fields(settings):
        name, value = f.metadata["called"] or f.name, getattr(settings, f.name)
        held = f.metadata["choices"], f.metadata["limits"]
        if get_origin(f.type) is not tuple:
            phrases = [why_wrong(allowed(f.type, *held), value)]
        elif not isinstance(value, tuple) or (f.default and not value):
            phrases = ["is empty" if value == () else f"is {value!r:.60}, but must be a list"]
        else:
            phrases = [why_wrong(allowed(get_args(f.type)[0], *held), item) for item in value]
        yield from (f"{name} {phrase}" for phrase in phrases if phrase)


def allowed(kind: Any, choices: Iterable[str] | None = None, limits: Limits | None = None) -> Any:
    """The type with what values of it are held to, for `why_wrong`."""
    held: list[Any] = [] if choices is None else [OneOf(tuple(choices))]
    held += [] if limits is None else [Between(*limits)]
    return Annotated[(kind, *held)] if held else kind

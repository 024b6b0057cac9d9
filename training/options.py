"""Settings as fields of dataclasses: each declares its help, choices and limits, and is held to them by its name."""

from collections.abc import Collection, Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, get_args, get_origin

from ..agd_core.errors import AGDError

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
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
    """A phrase for each field whose value its `option` doesn't allow."""
    for f in fields(settings):
        name, value = f.metadata["called"] or f.name, getattr(settings, f.name)
        allowed = f.metadata["choices"], f.metadata["limits"]
        if get_origin(f.type) is not tuple:
            yield from why_wrong(name, value, f.type, *allowed)
        elif not isinstance(value, tuple) or (f.default and not value):
            yield f"{name} is empty" if value == () else f"{name} is {value!r:.60}, but must be a list"
        else:
            for item in value:
                yield from why_wrong(name, item, get_args(f.type)[0], *allowed)


def why_wrong(
    name: str,
    value: Any,
    kind: Any,
    choices: Collection[str] | None = None,
    limits: Limits | None = None,
) -> Iterator[str]:
    """What keeps `value` from being one of type `kind`, in a phrase, or nothing. Infinity and NaN are in no limits."""
    if not _is_a(kind, value):
        yield f"{name} is {value!r:.60}, but must be {_KINDS[kind]}"
    elif choices is not None and value not in choices:
        yield f"{name} is {value!r:.60}, but must be one of {', '.join(choices)}"
    elif limits is not None and not limits[0] <= value <= limits[1]:
        yield f"{name} is {value!r:.60}, but must be from {' to '.join(map(_figure, limits))}"


def _is_a(kind: type, value: object) -> bool:
    """In Python True is a whole number too; as a setting it is none."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _figure(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else f"{limit}"

"""Data from files and people, checked against the types of fields and the limits that are annotated there.

    width: Annotated[int, Between(1, 65_536)]

JSON knows few types: a dataclass is an object with exactly its fields, a tuple a list, and a `TypedDict` an object in
which the named fields have those types, and in which there may be others. Errors name the field, what was found and
what is expected.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints, is_typeddict

from .text import first_of

_LISTED = 8  # unknown fields named in one error
_SHOWN = 60  # characters of what was found


class Between(NamedTuple):
    """Of a number."""

    least: float
    most: float

    def holds(self, value: Any) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"from {_figure(self.least)} to {_figure(self.most)}"


def _figure(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else f"{limit}"


class Items(NamedTuple):
    """Of a list: so many."""

    least: int
    most: int

    def holds(self, value: Any) -> bool:
        return self.least <= len(value) <= self.most

    def __str__(self) -> str:
        return f"a list of {self.least} to {self.most}"


class OneOf(NamedTuple):
    options: Collection[str]

    def holds(self, value: Any) -> bool:
        return value in self.options

    def __str__(self) -> str:
        return f"one of {', '.join(self.options)}"


class Multiple(NamedTuple):
    of: int

    def holds(self, value: Any) -> bool:
        return value % self.of == 0

    def __str__(self) -> str:
        return f"a multiple of {self.of}"


class Like(NamedTuple):
    """Of a text: all of it matches the regular expression. `example`: one that does."""

    pattern: str
    example: str

    def holds(self, value: Any) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return f"a text such as {self.example}"


class Numeral(NamedTuple):
    """Of a text: it is a number, as the names in a JSON object can't be of another type."""

    least: float
    most: float

    def holds(self, value: Any) -> bool:
        digits = re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,20})?(e[+-][0-9]{1,2})?", value)
        return digits is not None and self.least <= float(value) <= self.most

    def __str__(self) -> str:
        return f"a number from {_figure(self.least)} to {_figure(self.most)}"


class Printable(NamedTuple):
    """Of a text: at most so long, and nothing in it that can't be seen."""

    longest: int

    def holds(self, value: Any) -> bool:
        return len(value) <= self.longest and value.isprintable()

    def __str__(self) -> str:
        return f"a text of at most {self.longest} characters, all of which can be seen"


class _Type(NamedTuple):
    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TYPES = {
    int: _Type("a whole number", lambda value: isinstance(value, int) and _is_number(value)),
    float: _Type("a number", _is_number),
    bool: _Type("true or false", lambda value: isinstance(value, bool)),
    str: _Type("a text", lambda value: isinstance(value, str)),
    list: _Type("a list", lambda value: isinstance(value, list)),
    dict: _Type("an object", lambda value: isinstance(value, dict)),
    Any: _Type("anything", lambda value: True),
}


def _parts(expected: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its limits, and these."""
    return (get_args(expected)[0], get_args(expected)[1:]) if get_origin(expected) is Annotated else (expected, ())


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _json_type(kind: Any) -> Any:
    if is_dataclass(kind) or is_typeddict(kind) or get_origin(kind) is dict:
        return dict
    return list if get_origin(kind) is tuple or _is_named_tuple(kind) else kind


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def why_wrong(expected: Any, data: Any) -> str | None:
    """What `data` is instead of `expected`, in a phrase, its own parts aside; None where it is that.

    Infinity and NaN are numbers, but in no limits.
    """
    kind, limits = _parts(expected)
    json_type = _TYPES[_json_type(kind)]
    broken = (str(limit) for limit in limits if not limit.holds(data))
    wanted = next(broken, None) if json_type.fits(data) else json_type.words
    return None if wanted is None else f"is {_shown(data)}, but must be {wanted}"


def _shown(data: Any) -> str:
    if isinstance(data, (list, dict)):
        return f"{'a list' if isinstance(data, list) else 'an object'} of {len(data):,}"
    names = {None: "null", True: "true", False: "false"}
    found = names[data] if data is None or isinstance(data, bool) else repr(data)
    return found if len(found) <= _SHOWN else f"{found[:_SHOWN]}..."


def read(expected: Any, data: Any, name: str) -> Any:
    """`data`, as JSON has it, as a value of the type `expected`. Raises `ValueError`, naming it `name`."""
    if wrong := why_wrong(expected, data):
        raise ValueError(f"{name} {wrong}")
    kind = _parts(expected)[0]
    if is_dataclass(kind):
        return kind(**_read_fields(_hints_of_fields(kind), data, name))  # type: ignore[operator]
    if _is_named_tuple(kind):
        return kind(*_read_tuple(tuple(_hints(kind).values()), data, name))
    if is_typeddict(kind):
        if missing := sorted(kind.__required_keys__ - set(data)):
            raise ValueError(f"{name}: missing fields {missing}")
        known = {key: hint for key, hint in _hints(kind).items() if key in data}
        return data | _read_all({key: (known[key], data[key]) for key in known}, name)
    if get_origin(kind) is dict:
        key_type, value_type = get_args(kind)
        _read_all({f"{key!r:.{_SHOWN}}": (key_type, key) for key in data}, f"a name in {name},")
        return _read_all({key: (value_type, value) for key, value in data.items()}, name)
    if get_origin(kind) is tuple:
        return _read_tuple(get_args(kind), data, name)
    return float(data) if kind is float else data


def _read_tuple(types: tuple[Any, ...], data: list, name: str) -> tuple:
    if types[-1] is Ellipsis:
        types = types[:1] * len(data)
    if len(types) != len(data):
        raise ValueError(f"{name} is a list of {len(data):,}, but must be one of {len(types)}")
    each = {f"[{i}]": pair for i, pair in enumerate(zip(types, data, strict=True))}
    return tuple(_read_all(each, name).values())


def _hints_of_fields(kind: Any) -> dict[str, Any]:
    return {f.name: _hints(kind)[f.name] for f in fields(kind)}


def _read_fields(hints: dict[str, Any], data: dict[str, Any], name: str) -> dict[str, Any]:
    if set(data) != set(hints):
        missing, unknown = sorted(set(hints) - set(data)), sorted(set(data) - set(hints))
        shown = [key[:_SHOWN] for key in unknown[:_LISTED]]
        raise ValueError(f"{name}: missing fields {missing}, unknown fields {shown}")
    return _read_all({key: (hint, data[key]) for key, hint in hints.items()}, name)


def _read_all(parts: dict[str, tuple[Any, Any]], name: str) -> dict[str, Any]:
    """Every part read. Raises one `ValueError` for all that are wrong."""
    found, wrong = {}, []
    for key, (expected, data) in parts.items():
        try:
            found[key] = read(expected, data, f"{name}{key}" if key.startswith("[") else f"{name}.{key}")
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(first_of(wrong))
    return found


def depth(data: Any) -> int:
    """How deeply lists and objects are nested."""
    level, found = [data], 0
    while level:
        nested = [value for value in level if isinstance(value, (list, dict))]
        level = [child for value in nested for child in (value.values() if isinstance(value, dict) else value)]
        found += bool(nested)
    return found


def wrong_fields(instance: Any) -> Iterator[str]:
    """What is wrong with the plain values of a dataclass that was made in code, a phrase for each field."""
    for name, hint in _hints_of_fields(type(instance)).items():
        if _parts(hint)[0] in _TYPES and (wrong := why_wrong(hint, getattr(instance, name))):
            yield f"{name} {wrong}"

"""Adapter files damaged at random, as strangers, other programs and failing disks make them."""

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

_HUGE = 10**400
# What may stand in a description in place of something else, as JSON writes it.
VALUES = ("null", "true", "false", "0", "-1", "1", "2", "7", "1.5", "-0.0", "1e999", "NaN", "-Infinity", str(_HUGE))
VALUES += (
    "513",
    "2147483648",
    "9223372036854775808",
    '""',
    '"x"',
    '"input_1_0"',
    '"1.5"',
    '"delta"',
    "[]",
    "{}",
    "[[]]",
)
VALUES += ('"\\u001b[31m"', '"\\u0000"', '"\\ud800"', '"\\u202e"', '"<script>alert(1)</script>"', '"../../../etc"')
VALUES += (json.dumps("x" * 20_000), "[" * 30 + "]" * 30, "[" * 5_000 + "]" * 5_000, json.dumps([1] * 3_000))
VALUES += ('{"x": 1}', '[1, "a", null]', '[["a", 1, 1, true]]')


def places(data: Any, place: tuple = ()) -> Iterator[tuple]:
    """Every place in JSON data, as the keys and numbers that lead there."""
    yield place
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, child in children:
        yield from places(child, (*place, key))


def _damage(data: Any, rng: random.Random) -> Any:
    """JSON data with one place of it removed, renamed, repeated or replaced."""
    place = rng.choice([place for place in places(data) if place])
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    key, how = place[-1], rng.randrange(6)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "x", "kind", "<b>", "\x1b"])] = parent.pop(key)
    elif how == 2 and isinstance(parent, list):
        parent += [parent[key]] * rng.choice([1, 3, 3_000])
    elif how == 3:
        parent[key] = copy.deepcopy(_at(data, rng.choice(list(places(data)))))
    else:
        parent[key] = f"VALUE {rng.randrange(len(VALUES))}"  # not yet itself: JSON data can't hold all of them
    return data


def _at(data: Any, place: tuple) -> Any:
    for key in place:
        data = data[key]
    return data


def damaged_description(text: str, rng: random.Random) -> str:
    """A description as JSON with one to three places of it damaged."""
    data = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if len(list(places(data))) > 1:
            data = _damage(data, rng)
    text = json.dumps(data)
    for number, value in enumerate(VALUES):
        text = text.replace(f'"VALUE {number}"', value)
    return text


def with_description(file: bytes, text: str) -> bytes:
    """A safetensors file with another text under `agd` in its metadata."""
    length = struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"]["agd"] = text
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + file[8 + length :]


def damaged_bytes(file: bytes, rng: random.Random) -> bytes:
    """A file cut short, or with some bytes changed in its header or anywhere."""
    if rng.random() < 0.2:
        return file[: rng.randrange(len(file))]
    found, end = bytearray(file), rng.choice([8, 8 + struct.unpack("<Q", file[:8])[0], len(file)])
    for _ in range(rng.choice([1, 2, 10])):
        found[rng.randrange(end)] = rng.randrange(256)
    return bytes(found)

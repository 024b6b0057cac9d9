"""Tables of rows, for a terminal and in Markdown: a column is defined once for both."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """`text` makes a row's cell. `width`: in characters on a terminal; negative where the column is flush left."""

    heading: str
    text: Callable[[Row], str]
    width: int = 0


def markdown_table(columns: Sequence[Column[Row]], rows: Iterable[Row]) -> str:
    lines = [[column.heading for column in columns], ["---"] * len(columns)]
    lines += [[column.text(row) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def console_table(columns: Sequence[Column[Row]], rows: Iterable[Row]) -> Iterator[str]:
    """Its lines, each as soon as its row is there."""

    def line(cells: Iterable[str]) -> str:
        padded = zip(columns, cells, strict=True)
        return "".join(f"{cell:{'<' if column.width < 0 else '>'}{abs(column.width)}}" for column, cell in padded)

    yield line(column.heading for column in columns)
    for row in rows:
        yield line(column.text(row) for column in columns)

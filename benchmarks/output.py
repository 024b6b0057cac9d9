"""What benchmarks write: rows of measured values with their errors, as JSON and in Markdown pages."""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from comfyui_agd.agd_core.atomic import replacing
from comfyui_agd.examples.toy.tables import Column, markdown_table

RESULTS = Path(__file__).resolve().parent / "results"


class Figure(NamedTuple):
    """A measured value in a table: its heading, the row's key, a factor, and the digits after the point."""

    heading: str
    key: str
    factor: float = 1
    digits: int = 3

    def text(self, row: dict) -> str:
        """The value, and its standard error where there is one."""
        value, error = row.get(self.key), row.get(f"{self.key}_se")
        if value is None:
            return "–"
        text = f"{round(value * self.factor, self.digits) + 0.0:.{self.digits}f}"  # no "-0.0"
        return text if error is None else f"{text} ± {error * self.factor:.{self.digits}f}"


def columns_of(figures: Iterable[Figure]) -> list[Column]:
    return [Column(figure.heading, figure.text) for figure in figures]


def tables_by_section(rows: list[dict], columns_for: Callable[[list[dict]], Sequence[Column]]) -> str:
    """Markdown: a heading and a table for each section of the rows. `columns_for` chooses them for a section's rows."""
    sections: dict[str, list[dict]] = {}
    for row in rows:
        sections.setdefault(row["section"], []).append(row)
    parts = [f"## {name}\n\n{markdown_table(columns_for(own), own)}" for name, own in sections.items()]
    return "\n\n".join(parts)


def number(value: float | None) -> float | None:
    """As JSON has them: of very few pictures some errors and ratios don't exist."""
    return round(value, 5) if value is not None and math.isfinite(value) else None


def with_errors(measured: dict[str, tuple[float | None, float | None]]) -> dict[str, float | None]:
    """Values and their standard errors as a row has them: `key` and `key_se`."""
    row = {}
    for key, (value, error) in measured.items():
        row |= {key: number(value), f"{key}_se": number(error)}
    return row


def over_trainings(rows: list[dict]) -> dict:
    """One row of those of several trainings of the same: their means, and `key_between`, the standard deviation s
    between n trainings. A mean's standard error has both in it: sqrt(se^2 + s^2 / n), with the mean square of theirs,
    which is of captions and noise that all of them had.
    """
    row = rows[0] | {"trainings": len(rows)}
    if len(rows) == 1:
        return row
    for key in [key for key in rows[0] if f"{key}_se" in row and row[key] is not None]:
        values, errors = ([each[name] for each in rows] for name in (key, f"{key}_se"))
        between = statistics.stdev(values)
        row |= {key: number(statistics.fmean(values)), f"{key}_between": number(between)}
        if None not in errors:
            own = statistics.fmean(error**2 for error in errors)
            row[f"{key}_se"] = number(math.sqrt(own + between**2 / len(rows)))
    return row


def results_folder(args: argparse.Namespace) -> Path | None:
    """Where a page is to be written: --results, or `RESULTS`, or with --quick nowhere."""
    return args.results or (None if args.quick else RESULTS)


def write_page(folder: Path, name: str, page: str, rows: list[dict]) -> None:
    """`name`.md and `name`.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(page)
    write_rows(folder / f"{name}.json", rows)


def publish_page(args: argparse.Namespace, name: str, page: str, rows: list[dict]) -> None:
    """Print the page, and write it where a command's `results` and `quick` say."""
    print(page)
    if folder := results_folder(args):
        write_page(folder, name, page, rows)


def publish(args: argparse.Namespace, name: str, page: str, rows: list[dict]) -> None:
    """The only page of a command, and what its `json` asks for."""
    publish_page(args, name, page, rows)
    if args.json:
        write_rows(args.json, rows)


def write_rows(file: Path, rows: list[dict]) -> None:
    """Whole or not at all: who reads it need not wait for the end."""
    with replacing(file) as temporary:
        Path(temporary).write_text(json.dumps(rows, indent=1) + "\n")

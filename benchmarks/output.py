"""What the quality commands have in common in what they write."""

import datetime
import json
import math
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def made_on(device: str) -> str:
    """When and on what, in general words."""
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    return f"{datetime.date.today():%d %B %Y}, on {torch.cuda.get_device_name() if device == 'cuda' else machine}"


def number(value: float | None) -> float | None:
    """As JSON has them: of very few pictures some errors and ratios don't exist."""
    return round(value, 5) if value is not None and math.isfinite(value) else None


def with_errors(measured: dict[str, tuple[float | None, float | None]]) -> dict[str, float | None]:
    """Values and their standard errors as a row has them: `key` and `key_se`."""
    row = {}
    for key, (value, error) in measured.items():
        row |= {key: number(value), f"{key}_se": number(error)}
    return row


def write(folder: Path, name: str, page: str, rows: list[dict]) -> None:
    """`name`.md and `name`.json in a folder of results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(page)
    write_rows(folder / f"{name}.json", rows)


def publish(args, name: str, page: str, rows: list[dict]) -> None:
    """Show the page, and write what a command's `results`, `quick` and `json` ask for."""
    print(page)
    results = args.results or (None if args.quick else RESULTS)
    if results:
        write(results, name, page, rows)
    if args.json:
        write_rows(args.json, rows)


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text(json.dumps(rows, indent=1) + "\n")

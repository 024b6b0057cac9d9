"""The table of cards in docs/training.md is what benchmarks/step_cost.py found."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_its_rows_are_those_of_the_results():
    section = (ROOT / "docs/training.md").read_text().split("## On which card")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| S")]
    found = (ROOT / "benchmarks/results/step_cost.md").read_text().splitlines()
    assert len(rows) == 2
    assert all(row in found for row in rows)

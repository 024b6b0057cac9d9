"""The tables of cards in README.md and docs/training.md are what benchmarks/step_cost.py found."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("page", "heading"), [("docs/training.md", "## On which card"), ("README.md", "## What training takes")]
)
def test_their_rows_are_those_of_the_results(page, heading):
    section = (ROOT / page).read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and " | " in line][2:]
    found = (ROOT / "benchmarks/results/step_cost.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) >= 4
    assert [row for row in rows if row not in found] == []
    assert "estimate" in section.lower()

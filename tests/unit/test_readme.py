"""README.md is short for those who only want to use it."""

from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
LONGEST = 500  # words, but for tables


def test_what_comes_before_more_is_short():
    lines = README.split("\n## More\n")[0].splitlines()
    assert sum(len(line.split()) for line in lines if not line.startswith("|")) <= LONGEST

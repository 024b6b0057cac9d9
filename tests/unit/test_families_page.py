"""docs/families.md says of every family what its row says."""

from pathlib import Path

from comfyui_agd.agd_core.families import FAMILIES, Family

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text(encoding="utf-8")


def line_of(family: Family) -> str:
    attentions = family.layout == "unet" or bool(family.attention)
    kinds = "delta, low_rank, scale" if attentions else "low_rank"
    negative = "attention" if attentions else "vector"
    return f"| {family.title} | `{family.name}` | {kinds} | {negative} | yes | yes |"


def test_the_table_has_a_line_for_every_row():
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and "`" in line]
    assert lines == [line_of(family) for family in FAMILIES]

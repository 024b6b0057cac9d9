"""docs/families.md says of every family what its row says; README.md says the same of some."""

from pathlib import Path

from comfyui_agd.agd_core.families import FAMILIES, Family

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The families that a small trained model stands for.
TOYS = {"SD15": ", toy", "SD3": ", toy-dit"}
# No test has their own layout.
BY_RELATIVES = ("SD21UnclipL", "LotusD", "KOALA_1B")


def has_delta(family: Family) -> bool:
    return family.layout == "unet" or bool(family.attention)


def negative(family: Family) -> str:
    return "used" if has_delta(family) else "in part"


def ground_of(family: Family) -> str:
    if family.name in BY_RELATIVES:
        return "its relatives"
    return ("true layout" if family.layout == "unet" else "tiny layout") + TOYS.get(family.name, "")


def line_of(family: Family) -> str:
    kinds = "delta, low_rank, scale" if has_delta(family) else "low_rank"
    return f"| {family.title} | `{family.name}` | {kinds} | {negative(family)} | yes | {ground_of(family)} | yes |"


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_the_table_has_a_line_for_every_row():
    assert [line for line in rows(PAGE) if "`" in line] == [line_of(family) for family in FAMILIES]


def test_the_readme_says_the_same_of_some():
    section = README.split("## Which models")[1].split("\n## ")[0]
    _, _, *found = rows(section)
    lines = [f"| {f.title} | yes | {negative(f)} | yes | {ground_of(f)} |" for f in FAMILIES]
    assert len(found) >= 10
    assert [line for line in lines if line in found] == found

"""Tables of benchmarks and of the toy: cells, errors, sections, and which rows a command is asked for."""

from pathlib import Path

import pytest

from comfyui_agd.benchmarks.command_line import add_toys, add_work, benchmark_parser, selected, work_path
from comfyui_agd.benchmarks.output import Figure, columns_of, over_trainings, tables_by_section, with_errors
from comfyui_agd.examples.toy.tables import Column, console_table, markdown_table

NAME = Column("name", lambda row: row["name"], -6)
VALUE = Column("value", lambda row: f"{row['value']:.1f}", 8)
ROWS = [{"name": "a", "value": 1.25}, {"name": "b", "value": 10}]


def test_a_markdown_table_has_a_line_per_row():
    assert markdown_table([NAME, VALUE], ROWS) == "| name | value |\n| --- | --- |\n| a | 1.2 |\n| b | 10.0 |"


def test_a_console_table_is_flush_left_where_the_width_is_negative():
    assert list(console_table([NAME, VALUE], ROWS)) == ["name     value", "a          1.2", "b         10.0"]


def test_a_console_table_prints_each_row_before_the_next_is_made():
    made = []

    def rows():
        for row in ROWS:
            made.append(row["name"])
            yield row

    lines = console_table([NAME], rows())
    next(lines)
    assert made == []
    next(lines)
    assert made == ["a"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"gap": 0.51234, "gap_se": 0.0123}, "51.2 ± 1.2"),
        ({"gap": -0.0001}, "0.0"),
        ({"gap": None, "gap_se": None}, "–"),
        ({}, "–"),
    ],
)
def test_a_figure_shows_its_error_where_there_is_one(row, text):
    assert Figure("gap closed, %", "gap", 100, 1).text(row) == text


def test_rows_have_errors_and_no_number_that_json_lacks():
    assert with_errors({"gap": (0.1234567, float("nan"))}) == {"gap": 0.12346, "gap_se": None}


def test_each_section_has_a_table_of_its_own():
    rows = [{"section": name, "gap": value} for name, value in (("one", 1), ("two", 2), ("one", 3))]
    page = tables_by_section(rows, lambda own: columns_of([Figure(f"{len(own)} rows", "gap", 1, 0)]))
    assert page == "## one\n\n| 2 rows |\n| --- |\n| 1 |\n| 3 |\n\n## two\n\n| 1 rows |\n| --- |\n| 2 |"


def test_what_is_asked_for_is_found_by_a_part_of_its_name():
    assert selected(["Kinds delta", "Kinds offset", "Prompts delta"], ["DELTA"], "variant") == [0, 2]
    with pytest.raises(SystemExit, match="No variant has x or y in its name or section"):
        selected(["Kinds delta"], ["x", "y"], "variant")


def test_a_quick_run_and_each_base_have_a_work_folder_of_their_own():
    parser = benchmark_parser("", quick="")
    add_work(parser, "quality")
    assert work_path(parser.parse_args([]), "quality").name == "quality"
    assert work_path(parser.parse_args(["--quick"]), "quality").name == "quality-quick"
    assert work_path(parser.parse_args([]), "quality", "toy-dit").name == "quality-toy-dit"
    given = parser.parse_args(["--quick", "--work", "there/here"])
    assert work_path(given, "quality") == Path("there/here")
    assert work_path(given, "quality", "toy-dit") == Path("there/here-toy-dit")


def test_both_bases_are_measured_unless_one_is_named():
    parser = benchmark_parser("", quick="")
    add_toys(parser)
    assert parser.parse_args([]).base == ["toy", "toy-dit"]
    assert parser.parse_args(["--base", "toy-dit"]).base == ["toy-dit"]


def test_of_several_trainings_there_are_means_whose_errors_know_of_the_others():
    rows = [
        {"method": "ours", "accuracy": value, "accuracy_se": 0.03, "gap": None, "gap_se": None} for value in (0.9, 0.7)
    ]
    row = over_trainings(rows)
    assert (row["method"], row["trainings"], row["gap"]) == ("ours", 2, None)
    assert row["accuracy"] == pytest.approx(0.8)
    assert row["accuracy_between"] == pytest.approx(0.02**0.5, abs=1e-5)
    assert row["accuracy_se"] == pytest.approx((0.03**2 + 0.02 / 2) ** 0.5, abs=1e-5)
    assert over_trainings(rows[:1]) == rows[0] | {"trainings": 1}

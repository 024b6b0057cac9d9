"""Plots and previews of any run, short, measured or not."""

from dataclasses import replace

import pytest
from PIL import Image

from comfyui_agd.tests.support.analytic import CONFIG, PROMPTS, AnalyticModel
from comfyui_agd.training.config import LOSSES
from comfyui_agd.training.gap import Measurement
from comfyui_agd.training.plot import Diagram, Grid, contact_sheet, loss_plot, preview, smooth, stacked, training_plot
from comfyui_agd.training.run_setup import RunOptions
from comfyui_agd.training.trainer import train


def measured(step: int, closed: float) -> Measurement:
    return Measurement(step, closed, {"2.3": closed, "12": closed / 2})


def test_smooth_is_a_trailing_mean():
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize("losses", [[], [0.5], [0.0, 0.0], [1.0, 0.9, 30.0, 0.7]])
def test_any_losses_can_be_plotted(losses):
    assert loss_plot(losses).size == (800, 400)


@pytest.mark.parametrize(
    ("history", "plots"),
    [
        ([], 1),
        ([Measurement(5, 0.5)], 1),  # as ranks have it that don't measure
        ([measured(5, 0.5)], 2),
        ([measured(5, -3.0), measured(10, 0.0)], 2),
    ],
)
def test_what_was_measured_is_plotted_below_the_loss(history, plots):
    image = training_plot([1.0] * 10, history)
    assert image.size == (800, 400 * plots)


def test_the_title_says_which_loss_it_is(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Diagram, "__init__", titled(Diagram.__init__, titles))
    for loss in LOSSES:
        train(
            AnalyticModel(), PROMPTS, replace(CONFIG, loss=loss, held_out=0), options=RunOptions(folder=tmp_path / loss)
        )
    balanced, plain = "share of the guidance gap still open", "mean squared error to the teacher"
    # While it trains, twice, and at its end.
    assert titles == 3 * [f"AGD training: {balanced}"] + 3 * [f"AGD training: {plain}"]


def titled(init, titles: list[str]):
    def watched(self, title, *args, **kwargs):
        titles.append(title)
        init(self, title, *args, **kwargs)

    return watched


def test_a_curve_is_drawn():
    blank, drawn = loss_plot([]), loss_plot([1.0, 0.5, 0.2])
    assert blank.tobytes() != drawn.tobytes()


def test_a_preview_shows_its_pictures_side_by_side_under_their_names():
    image = preview({"CFG 5": Image.new("RGB", (64, 32), "red"), "AGD 5": Image.new("RGB", (64, 32), "blue")})
    assert image.height >= 256
    lower = image.crop((0, image.height - 100, image.width, image.height))
    assert lower.getpixel((10, 50)) == (255, 0, 0)
    assert lower.getpixel((image.width - 10, 50)) == (0, 0, 255)


def test_a_contact_sheet_has_a_row_per_prompt_and_a_column_per_method():
    small, large = Image.new("RGB", (64, 32), "red"), Image.new("RGB", (1024, 2048), "blue")
    sheet = contact_sheet(
        ("unguided", "CFG"), [("a star", [small, small]), ("a very long prompt " * 50, [small, small])]
    )
    assert sheet.size == (2 * 520 - 8, 28 + 2 * (28 + 256))
    assert sheet.getpixel((519, 200)) == (255, 255, 255)  # between the columns
    assert sheet.getpixel((521, 330)) != (255, 0, 0)  # the second row's text
    assert sheet.getpixel((521, 400)) == (255, 0, 0)
    assert contact_sheet(("unguided",), [("a star", [large])]).size == (256, 28 + 28 + 512)


def test_a_grid_has_its_pictures_at_their_corners_and_nothing_else():
    grid = Grid(4, 3, left=10, top=5, above=2, between=1, right=6, bottom=7)
    sheet = grid.sheet([[Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]] * 2)
    assert sheet.size == (10 + 2 * 4 + 1 + 6, 5 + 2 * (2 + 3) + 7)
    assert sheet.getpixel(grid.corner(1, 1)) == (0, 0, 255)
    x, y = grid.corner(1, 1)
    assert sheet.getpixel((x - 1, y)) == sheet.getpixel((x, y - 1)) == (255, 255, 255)


@pytest.mark.parametrize(("sideways", "size"), [(False, (2, 6)), (True, (4, 3))])
def test_images_are_stacked_in_one(sideways, size):
    whole = stacked([Image.new("RGB", (2, 3), colour) for colour in ("red", "blue")], sideways=sideways)
    assert whole.size == size
    assert whole.getpixel((size[0] - 1, size[1] - 1)) == (0, 0, 255)

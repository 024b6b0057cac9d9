"""Pictures of a training with PIL alone, which ComfyUI has: curves, and previews side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .gap import Measurement

_SIZE = (800, 400)  # of one diagram
_MARGINS = (80, 40, 30, 60)  # left, top, right, bottom of its plotting area
_INK, _GRID, _FAINT = "#222222", "#dddddd", "#b7cbe8"
_LINES = ("#1f5fbf", "#c2571a", "#2f8f4e", "#8250b0", "#a08000")
_TICKS = 5
_OF_LOSS = {
    "balanced": "AGD training: share of the guidance gap still open",
    "plain": "AGD training: mean squared error to the teacher",
}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and of up to `window - 1` before it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - window)]) / (i - max(0, i - window)) for i in range(1, len(sums))]


class Diagram:
    """Axes from (first, low) to (last, high), with curves."""

    def __init__(
        self,
        title: str,
        first: int,
        last: int,
        low: float,
        high: float,
        across: str = "iteration",
        size: tuple[int, int] = _SIZE,
    ):
        self.image = Image.new("RGB", size, "white")
        self.draw, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(size=14)
        self.first, self.last, self.low, self.high = first, max(last, first + 1), low, high
        self.box = (_MARGINS[0], _MARGINS[1], size[0] - _MARGINS[2], size[1] - _MARGINS[3])
        left, _, right, bottom = self.box
        for tick in range(_TICKS + 1):
            value, step = low + (high - low) * tick / _TICKS, first + (last - first) * tick // _TICKS
            x, y = self._point(step, value)
            self.draw.line([(left, y), (right, y)], fill=_GRID)
            self.draw.text((left - 8, y), f"{value:.3g}", fill=_INK, font=self.font, anchor="rm")
            self.draw.text((x, bottom + 8), str(step), fill=_INK, font=self.font, anchor="ma")
        self.draw.text((left, 12), title, fill=_INK, font=self.font)
        self.draw.text(((left + right) / 2, bottom + 34), across, fill=_INK, font=self.font, anchor="ma")

    def _point(self, step: float, value: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return left + (right - left) * (step - self.first) / (self.last - self.first), bottom - (bottom - top) * share

    def curve(self, points: Sequence[tuple[float, float]], colour: str, width: int = 3, dots: bool = False) -> None:
        self.draw.line([self._point(*point) for point in points], fill=colour, width=width)
        self.dots(points if dots else [], colour)

    def dots(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        for x, y in (self._point(*point) for point in points):
            self.draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)

    def ring(self, points: Sequence[tuple[float, float]], colour: str = _INK) -> None:
        """Mark these points."""
        for x, y in (self._point(*point) for point in points):
            self.draw.ellipse([x - 8, y - 8, x + 8, y + 8], outline=colour, width=2)

    def key(self, names: Sequence[str], colours: Sequence[str]) -> None:
        """Long names, one below the other inside the plotting area."""
        for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
            at = (self.box[2] - 8, self.box[3] - 8 - 20 * (len(names) - 1 - i))
            self.draw.text(at, name, fill=colour, font=self.font, anchor="rd")

    def legend(self, names: Sequence[str]) -> None:
        x: float = self.box[2]
        for name, colour in reversed(list(zip(names, _LINES, strict=False))):
            self.draw.text((x, 12), name, fill=colour, font=self.font, anchor="ra")
            x -= self.draw.textlength(name, font=self.font) + 16


def loss_plot(losses: Sequence[float], loss: str = "balanced") -> Image.Image:
    """Loss by iteration: every value faint, the running mean strong. The axis starts at 0. `loss`: which of LOSSES."""
    highest = max(*sorted(losses)[: max(1, int(len(losses) * 0.99))], 1e-12) if losses else 1.0
    diagram = Diagram(_OF_LOSS[loss], 1, len(losses), 0.0, highest)
    diagram.curve(list(enumerate(losses, 1)), _FAINT, width=1)
    diagram.curve(list(enumerate(smooth(losses, max(1, len(losses) // 40)), 1)), _LINES[0])
    return diagram.image


def gap_plot(history: Sequence[Measurement], last: int) -> Image.Image:
    """Gap closed on held-out prompts by iteration, a curve per omega. `last`: iteration."""
    omegas = list(history[0].gap_closed)
    values = [value for measured in history for value in measured.gap_closed.values()]
    diagram = Diagram("Gap closed on held-out prompts", 1, last, min(0.0, *values), max(0.1, *values) * 1.05)
    for omega, colour in zip(omegas, _LINES, strict=False):
        points = [(measured.step, measured.gap_closed[omega]) for measured in history]
        diagram.curve(points, colour, dots=True)
    diagram.legend([f"cfg {omega}" for omega in omegas])
    return diagram.image


def training_plot(losses: Sequence[float], history: Sequence[Measurement], loss: str = "balanced") -> Image.Image:
    """Loss, which is `loss` of LOSSES, and below it gap closed, where that was measured."""
    measured = [each for each in history if each.gap_closed]
    return stacked([loss_plot(losses, loss), *([gap_plot(measured, len(losses))] if measured else [])])


def stacked(images: Sequence[Image.Image], *, sideways: bool = False) -> Image.Image:
    """Images of one size in one, below each other or beside each other."""
    width, height = images[0].size
    across, down = (len(images), 1) if sideways else (1, len(images))
    whole = Image.new("RGB", (width * across, height * down), "white")
    for i, image in enumerate(images):
        whole.paste(image, (i * width, 0) if sideways else (0, i * height))
    return whole


@dataclass(frozen=True)
class Grid:
    """Where pictures of one size go on a sheet, in pixels: the space at its left and top, above each row, between
    columns, and at its right and bottom."""

    width: int
    height: int
    left: int = 0
    top: int = 0
    above: int = 28
    between: int = 8
    right: int = 0
    bottom: int = 0

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Of a picture: the left and upper one."""
        x = self.left + column * (self.width + self.between)
        return x, self.top + row * (self.height + self.above) + self.above

    def sheet(self, rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
        """A white sheet with these pictures."""
        x, y = self.corner(len(rows), len(rows[0]))
        sheet = Image.new("RGB", (x - self.between + self.right, y - self.above + self.bottom), "white")
        for j, pictures in enumerate(rows):
            for i, picture in enumerate(pictures):
                sheet.paste(picture, self.corner(j, i))
        return sheet


def preview(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures of one size side by side under their names, each at least 256 pixels high."""
    scale = max(1, -(-256 // next(iter(pictures.values())).height))
    sized = [picture.resize((picture.width * scale, picture.height * scale)) for picture in pictures.values()]
    grid = Grid(*sized[0].size)
    image = grid.sheet([sized])
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for i, name in enumerate(pictures):
        draw.text((grid.corner(0, i)[0] + 4, 6), name, fill=_INK, font=font)
    return image


def contact_sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Pictures of one size in a grid: the columns' names at the top, above each row what it is.

    Each is shown 256 to 512 pixels high.
    """
    width, height = rows[0][1][0].size
    scale = 512 / height if height > 512 else max(1, -(-256 // height))
    grid = Grid(round(width * scale), round(height * scale), top=28)
    sheet = grid.sheet([[picture.resize((grid.width, grid.height)) for picture in pictures] for _, pictures in rows])
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for i, name in enumerate(columns):
        draw.text((grid.corner(0, i)[0] + 4, 6), name, fill=_LINES[0], font=font)
    for j, (text, _) in enumerate(rows):
        at = (4, grid.corner(j, 0)[1] - grid.above + 6)
        draw.text(at, _shortened(text, sheet.width - 8, draw, font), fill=_INK, font=font)
    return sheet


def _shortened(text: str, width: float, draw: ImageDraw.ImageDraw, font) -> str:
    """`text`, or as much of its beginning as is not wider than that."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font=font) > width:
        text = text[:-1]
    return f"{text}..."

"""Draws docs/icon.png and docs/banner.png, which the registry shows: two evaluations that become one."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parents[1] / "docs"
ICON = (400, 400)
BANNER = (1680, 720)
TITLE, LINE = "AGD", "one model call per step instead of two"
_BACKGROUND, _TEXT = (24, 26, 33), (240, 242, 247)
_PROMPT, _NEGATIVE, _GUIDED = (255, 176, 58), (102, 140, 255), (250, 250, 250)
_FINER = 4  # drawn larger, so that edges are smooth
_POINTS = 400

Point = tuple[float, float]
Colour = tuple[int, int, int]


def _between(a: tuple, b: tuple, part: float) -> tuple:
    return tuple(x + part * (y - x) for x, y in zip(a, b, strict=True))


def _s_curve(start: Point, end: Point, part: float) -> Point:
    """A point between both, level at either end."""
    return start[0] + part * (end[0] - start[0]), start[1] + part * part * (3 - 2 * part) * (end[1] - start[1])


def _dot(draw: ImageDraw.ImageDraw, at: Point, radius: float, colour: tuple) -> None:
    x, y = at
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(map(round, colour)))


def _draw_line(
    draw: ImageDraw.ImageDraw, start: Point, end: Point, width: float, colours: tuple[Colour, Colour]
) -> None:
    for index in range(_POINTS + 1):
        part = index / _POINTS
        _dot(draw, _s_curve(start, end, part), width / 2, _between(*colours, part**2))


def _draw_mark(draw: ImageDraw.ImageDraw, left: float, top: float, size: float) -> None:
    """Two lines that meet in a dot, in a square with its corner at (left, top)."""

    def at(x: float, y: float) -> Point:
        return left + x * size, top + y * size

    for y, colour in ((0.82, _NEGATIVE), (0.18, _PROMPT)):
        _draw_line(draw, at(0.14, y), at(0.78, 0.5), 0.1 * size, (colour, _GUIDED))
        _dot(draw, at(0.14, y), 0.13 * size, colour)
    _dot(draw, at(0.8, 0.5), 0.2 * size, _GUIDED)


def _canvas(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (size[0] * _FINER, size[1] * _FINER), _BACKGROUND)
    return image, ImageDraw.Draw(image)


def icon() -> Image.Image:
    image, draw = _canvas(ICON)
    side = image.width
    _draw_mark(draw, 0.12 * side, 0.12 * side, 0.76 * side)
    return image.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    image, draw = _canvas(BANNER)
    unit = image.height
    _draw_mark(draw, 0.2 * unit, 0.26 * unit, 0.48 * unit)
    draw.text((0.84 * unit, 0.47 * unit), TITLE, _TEXT, ImageFont.load_default(0.26 * unit), anchor="ls")
    draw.text((0.85 * unit, 0.64 * unit), LINE, _TEXT, ImageFont.load_default(0.078 * unit), anchor="ls")
    return image.resize(BANNER, Image.Resampling.LANCZOS)


if __name__ == "__main__":
    icon().save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.png", optimize=True)

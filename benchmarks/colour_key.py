"""The key of a plot with many lines: their colours and names below it."""

import colorsys

from PIL import Image, ImageDraw, ImageFont

_SQUARE, _LINE, _LEFT, _RIGHT = 14, 26, 80, 20


def colour(hue: float, saturation: float, brightness: float) -> str:
    """As "#rrggbb", each from 0 to 1."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, brightness))
    return f"#{red:02x}{green:02x}{blue:02x}"


def with_key(plot: Image.Image, colours: dict[str, str], columns: int) -> Image.Image:
    """The plot with these names, by their colours, in so many columns below it."""
    lines = -(-len(colours) // columns)
    image = Image.new("RGB", (plot.width, plot.height + _LINE * lines + _SQUARE), "white")
    image.paste(plot, (0, 0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for i, (name, shade) in enumerate(colours.items()):
        x = _LEFT + i % columns * (plot.width - _LEFT - _RIGHT) // columns
        y = plot.height + 10 + _LINE * (i // columns)
        draw.rectangle([x, y, x + _SQUARE, y + _SQUARE], fill=shade)
        draw.text((x + 24, y + _SQUARE / 2), name, fill="#222222", font=font, anchor="lm")
    return image

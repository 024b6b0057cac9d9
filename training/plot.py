"""A loss plot with PIL alone, which ComfyUI has."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_SIZE = (800, 480)
_BOX = (80, 40, 770, 420)  # left, top, right, bottom of the plotting area
_INK, _GRID, _FAINT, _LINE = "#222222", "#dddddd", "#b7cbe8", "#1f5fbf"
_TICKS = 5


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and of up to `window - 1` before it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - window)]) / (i - max(0, i - window)) for i in range(1, len(sums))]


def loss_plot(
    losses: Sequence[float], title: str = "AGD training: share of the guidance gap still open"
) -> Image.Image:
    """Loss by iteration: every value faint, the running mean strong. The axis starts at 0."""
    image = Image.new("RGB", _SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    left, top, right, bottom = _BOX
    mean = smooth(losses, max(1, len(losses) // 40))
    highest = max(*sorted(losses)[: max(1, int(len(losses) * 0.99))], 1e-12)

    def point(i: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * i / max(1, len(losses) - 1)
        return x, bottom - (bottom - top) * min(value / highest, 1.0)

    for tick in range(_TICKS + 1):
        value, step = highest * tick / _TICKS, (len(losses) - 1) * tick // _TICKS
        y, x = point(0, value)[1], point(step, 0)[0]
        draw.line([(left, y), (right, y)], fill=_GRID)
        draw.text((left - 8, y), f"{value:.3g}", fill=_INK, font=font, anchor="rm")
        draw.text((x, bottom + 8), str(step + 1), fill=_INK, font=font, anchor="ma")
    draw.line([point(i, value) for i, value in enumerate(losses)], fill=_FAINT, width=1)
    draw.line([point(i, value) for i, value in enumerate(mean)], fill=_LINE, width=3)
    draw.text((left, 12), title, fill=_INK, font=font)
    draw.text(((left + right) / 2, bottom + 34), "iteration", fill=_INK, font=font, anchor="ma")
    return image

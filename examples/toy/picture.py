"""Samples of several methods as one picture: a row each."""

import torch
from PIL import Image, ImageDraw, ImageFont

from comfyui_agd.training.plot import Grid

_SCALE, _GAP, _LABEL, _TITLE = 2, 6, 150, 28


def comparison(rows: list[tuple[str, torch.Tensor]], title: str = "") -> Image.Image:
    """One labelled row per (label, images (n, 3, h, w) in [0, 1]); every row has the same n."""
    *_, height, width = rows[0][1].shape
    size = (width * _SCALE, height * _SCALE)
    margins = {"left": _LABEL, "top": _TITLE if title else 0, "right": 2 * _GAP, "bottom": _GAP}
    grid = Grid(*size, above=_GAP, between=_GAP, **margins)
    sheet = grid.sheet([[_image(each).resize(size, Image.Resampling.LANCZOS) for each in images] for _, images in rows])
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    draw.text((_GAP + 4, 8), title, fill="#222222", font=font)
    for i, (label, _) in enumerate(rows):
        draw.text((_GAP + 4, grid.corner(i, 0)[1] + height), label, fill="#222222", font=font, anchor="lm")
    return sheet


def _image(pixels: torch.Tensor) -> Image.Image:
    """(3, h, w) in [0, 1]."""
    return Image.fromarray((pixels.movedim(0, -1) * 255).round().to(torch.uint8).numpy())

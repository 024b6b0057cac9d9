"""Contact sheets of samples."""

import torch
from PIL import Image, ImageDraw, ImageFont

_SCALE, _GAP, _LABEL = 2, 6, 150


def contact_sheet(rows: list[tuple[str, torch.Tensor]], title: str = "") -> Image.Image:
    """One labelled row per (label, images (n, 3, h, w) in [0, 1]); every row has the same n."""
    n, _, h, w = rows[0][1].shape
    cell_w, cell_h, top = w * _SCALE + _GAP, h * _SCALE + _GAP, 34 if title else _GAP
    sheet = Image.new("RGB", (_LABEL + n * cell_w + _GAP, top + len(rows) * cell_h), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    draw.text((_GAP + 4, 8), title, fill="#222222", font=font)
    for r, (label, images) in enumerate(rows):
        y = top + r * cell_h
        draw.text((_GAP + 4, y + h), label, fill="#222222", font=font, anchor="lm")
        for i, image in enumerate(images):
            pixels = (image.movedim(0, -1) * 255).round().to(torch.uint8).numpy()
            cell = Image.fromarray(pixels).resize((w * _SCALE, h * _SCALE), Image.Resampling.LANCZOS)
            sheet.paste(cell, (_LABEL + i * cell_w, y))
    return sheet

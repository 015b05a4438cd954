"""A picture of the whole set at a glance: one generated image of every class, with its name."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Pixels: an image on the sheet, the line for its name below, and the gap around both.
CELL, CAPTION, GAP = 96, 14, 4
# A sheet of more classes than this is cut: it would be too tall to look at.
MOST_CLASSES = 400


def draw_contact_sheet(images: NDArray[np.uint8], names: Sequence[str]) -> bytes:
    """A PNG of `images` [classes, 3, H, W], about square, in class order; of `MOST_CLASSES` at most."""
    count = min(len(images), MOST_CLASSES)
    columns = round(count**0.5)
    rows = -(-count // columns)
    step_x, step_y = CELL + GAP, CELL + CAPTION + GAP
    sheet = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index in range(count):
        x, y = GAP + index % columns * step_x, GAP + index // columns * step_y
        tile = Image.fromarray(images[index].transpose(1, 2, 0))
        smooth = Image.Resampling.LANCZOS if tile.width > CELL else Image.Resampling.NEAREST
        sheet.paste(tile.resize((CELL, CELL), smooth), (x, y))
        caption = names[index].replace("_", " ")
        while draw.textlength(caption, font=font) > CELL:
            caption = caption[:-1]
        draw.text((x, y + CELL), caption, fill="black", font=font)
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    return png.getvalue()

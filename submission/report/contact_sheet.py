"""A picture of the whole set at a glance: one generated image of every class, with its name."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Pixels: an image on the sheet, the line for its name below, and the gap around both.
CELL, CAPTION, GAP = 96, 14, 4
# A sheet of more classes than this is cut: it would be too tall to look at.
MOST_CLASSES = 400


def draw_contact_sheet(
    images: NDArray[np.uint8], names: Sequence[str], strips: Mapping[str, NDArray[np.uint8]] | None = None
) -> bytes:
    """A PNG of `images` [classes, 3, H, W], about square, in class order; of `MOST_CLASSES` at most. Below it come
    `strips` of other images [n, 3, H, W], each under its name, as many as a row holds."""
    count = min(len(images), MOST_CLASSES)
    columns = round(count**0.5)
    rows = -(-count // columns)
    step_x, step_y = CELL + GAP, CELL + CAPTION + GAP
    height = rows * step_y + GAP
    sheet = Image.new("RGB", (columns * step_x + GAP, height + len(strips or {}) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)

    def paste(image: NDArray[np.uint8], x: int, y: int) -> None:
        tile = Image.fromarray(image.transpose(1, 2, 0))
        smooth = Image.Resampling.LANCZOS if tile.width > CELL else Image.Resampling.NEAREST
        sheet.paste(tile.resize((CELL, CELL), smooth), (x, y))

    for index in range(count):
        x, y = GAP + index % columns * step_x, GAP + index // columns * step_y
        paste(images[index], x, y)
        caption = names[index].replace("_", " ")
        while draw.textlength(caption, font=font) > CELL:
            caption = caption[:-1]
        draw.text((x, y + CELL), caption, fill="black", font=font)
    for row, (name, strip) in enumerate((strips or {}).items()):
        draw.text((GAP, height + row * step_y), name, fill="black", font=font)
        for column, image in enumerate(strip[:columns]):
            paste(image, GAP + column * step_x, height + CAPTION + row * step_y)
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    return png.getvalue()

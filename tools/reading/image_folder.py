"""Folders of people's own images: JPEG, PNG and the like, of any size, in one folder per class.

Nothing in them is trusted: formats are few, sizes are read from headers before memory is taken for pixels, and whatever
a damaged file makes its reader raise is one line that names the file.
"""

import difflib
import os
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from submission.errors import InputFileError, first_line
from submission.machine.limits import cores
from submission.machine.memory import memory_free
from submission.tasks import Task, TaskClass
from submission.tasks.parse import did_you_mean

# What is read, of all that Pillow knows: pictures of pixels, by readers that are in daily use.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Endings of such files, in small letters. Files of other endings lie beside images: lists, boxes, previews.
ENDINGS = {".bmp", ".gif", ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
# Folders that systems make: what archives of a Mac, and a disk's repair, leave.
NOT_OURS = {"__MACOSX", "lost+found"}
# What `convert("RGB")` makes sense of; it would cut off the upper half of 16-bit greys.
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
# Pixels of an image at most, of which Pillow itself warns.
MOST_PIXELS = int(Image.MAX_IMAGE_PIXELS or 0)
# The part of the free memory that test images may take: training wants some, too.
MEMORY_SHARE = 0.5
# Pixels of the images that are read together where they are not kept: half a gigabyte while they are summed up.
PIXELS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Pictures:
    """`pixels` uint8 [N, 3, size, size] in RGB, with their classes, `labels` int64 [N]; both on the CPU."""

    pixels: Tensor
    labels: Tensor


def read_class_folders(folder: Path, task: Task, size: int) -> Pictures | None:
    """The images below `folder`, in one folder per class, called like it or like its WordNet id.

    Each is centre-cropped to a square and resized, with antialiasing, to `size` pixels. Folders of other names are
    left alone. None where no class has a folder. Raises InputFileError where some have none, for a file that is no
    image, and where memory does not hold them all; OSError.
    """
    # Systems differ in how they spell what looks the same.
    there = {unicodedata.normalize("NFC", path.name): path for path in folder.iterdir()} if folder.is_dir() else {}
    folders = [_class_folder(there, one) for one in task.classes]
    if not any(folders):
        return None
    files: list[Path] = []
    labels: list[int] = []
    for one, where in zip(task.classes, folders, strict=True):
        if where is None:
            others = [name for name, path in there.items() if path not in folders]
            close = did_you_mean(difflib.get_close_matches(one.name, others, n=1))
            raise InputFileError(f"{folder}: class {one.name!r} of {task.name} has no folder there{close}")
        found = find_images(where)
        if not found:
            raise InputFileError(f"{where}: there are no images of class {one.name!r}")
        files += found
        labels += [one.index] * len(found)
    need, free = len(files) * 3 * size**2 * 4, memory_free()  # in the float32 that they will come to
    if need > MEMORY_SHARE * free:
        raise InputFileError(
            f"{folder}: its {len(files):,} images at {size} px take {need / 1e9:.1f} GB of memory, and "
            f"{MEMORY_SHARE * free / 1e9:.1f} GB can be had: leave fewer there"
        )
    return Pictures(read_images(files, size), torch.tensor(labels))


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, by their endings, in the order of their paths; links are followed. Hidden ones,
    those in folders that systems and programs make for themselves, and files of other endings are passed over.

    Raises OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found, seen = [], set[str]()
    for path, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(path)) in seen:  # links may lead round in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "@", "$", "#")) and name not in NOT_OURS]
        images = [name for name in files if not name.startswith(".") and Path(name).suffix.lower() in ENDINGS]
        found += [Path(path, name) for name in images]
    return sorted(found)


def read_images(files: Sequence[Path], size: int) -> Tensor:
    """The images in files, upright, uint8 [N, 3, size, size]: the middle square of each, resized with antialiasing. On
    all cores, for Pillow lets others work while it decodes. Raises InputFileError."""
    pixels = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    pool = ThreadPoolExecutor(cores())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of palettes and damaged facts about a picture; for all threads
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for place, image in zip(pixels, pool.map(partial(_read_image, size=size), files), strict=True):
                place.copy_(torch.from_numpy(image).permute(2, 0, 1))
    finally:
        pool.shutdown(cancel_futures=True)  # whoever is told to stop does not read the rest
    return pixels


def _read_image(file: Path, size: int) -> NDArray[np.uint8]:
    try:
        if not file.is_file():
            raise ValueError("not a file")  # a pipe would never end
        with Image.open(file, formats=FORMATS) as image:
            if image.mode not in MODES:
                raise ValueError(f"pixels of mode {image.mode} are not read, only those of 8 bits a channel")
            square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size))
        return np.array(square)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputFileError(f"{file}: more than {MOST_PIXELS / 1e6:.0f} million pixels: make it smaller") from error
    except Exception as error:
        raise InputFileError(f"{file}: no image that can be read ({first_line(error)[:160]})") from error


def mean_and_deviation(files: Sequence[Path], size: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the pixels in 0..1 of images, read as above, four digits each.

    Raises InputFileError.
    """
    sums, squares = np.zeros(3), np.zeros(3)
    step = max(1, PIXELS_AT_ONCE // size**2)
    for first in range(0, len(files), step):
        pixels = read_images(files[first : first + step], size).numpy() / 255
        sums += pixels.mean((2, 3)).sum(0)
        squares += np.square(pixels).mean((2, 3)).sum(0)
    mean = sums / len(files)
    deviation = np.sqrt(np.maximum(squares / len(files) - mean**2, 0))
    return mean.round(4).tolist(), deviation.round(4).tolist()


def _class_folder(there: Mapping[str, Path], one: TaskClass) -> Path | None:
    for name in (one.name, one.wnid):
        if name and (found := there.get(unicodedata.normalize("NFC", name))) and found.is_dir():
            return found
    return None

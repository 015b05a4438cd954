"""From a folder of people's images to what the training draws from: read, shrunk, checked, kept for the next start."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from submission.errors import InputFileError
from submission.log import Log
from submission.tasks import Task
from tools.reading.image_folder import Pictures
from tools.reading.real_images import (
    as_pictures,
    find_test_images,
    find_test_images_beside,
    find_training_images,
)
from tools.training.images import RealImages
from tools.training.layout import canvas_for
from tools.training.progress import load_whole, save_whole

# Fewer images of a class than this are warned of: docs/own-data.md has what training on so few gave.
FEW = 50


def real_images(
    data: Path, truth: Path | None, tasks: Sequence[Task], output: Path, device: torch.device, log: Log
) -> list[RealImages]:
    """The training images of all tasks, those of one canvas together, in the order of the tasks, whose canvases rise.

    Test images, those that `data` names as such and those in `truth`, are left out where they are among them, with a
    warning. What was read is kept in `output` for as long as the files stay as they are. Raises InputFileError.
    """
    found = []
    for task in tasks:
        canvas = canvas_for(task.size)
        pictures = _kept(output / f"images_{task.name}.pt", data, truth, task, canvas, log)
        counts = pictures.labels.bincount(minlength=len(task.classes))
        fewest, least = task.classes[int(counts.argmin())].name, int(counts.min())
        if not least:
            raise InputFileError(f"{data}: class {fewest!r} of {task.name} has no images")
        if least < FEW:
            log.warn(
                f"class {fewest!r} of {task.name} has {least} images: with fewer than {FEW}, pictures become copies of "
                "them or tell little"
            )
        log.say(f"{task.name}: {len(pictures.labels):,} images of {len(counts)} classes, drawn at {canvas} px")
        order = pictures.labels.argsort(stable=True)
        found.append((pictures.pixels[order], counts))
    together: list[RealImages] = []
    first = 0
    for canvas in sorted({pixels.shape[-1] for pixels, _ in found}):
        of_canvas = [pair for pair in found if pair[0].shape[-1] == canvas]
        pixels, counts = (torch.cat(parts).to(device) for parts in zip(*of_canvas, strict=True))
        together.append(RealImages(pixels, counts, first))
        first += len(counts)
    return together


def _kept(file: Path, data: Path, truth: Path | None, task: Task, canvas: int, log: Log) -> Pictures:
    """The images of a task as they were kept, or read and kept now."""
    names = [one.name for one in task.classes]
    key = repr((canvas, names, [_fingerprint(folder) for folder in (data, truth) if folder]))
    if file.exists():
        kept = load_whole(file)
        if kept["key"] == key:
            return Pictures(kept["pixels"], kept["labels"])
    pictures = find_training_images(data, task, canvas)
    test = _test_pixels(data, truth, task, canvas)
    if test is not None:
        pictures = without(pictures, test, task, log)
    save_whole({"key": key, "pixels": pictures.pixels, "labels": pictures.labels}, file)
    return pictures


def _test_pixels(data: Path, truth: Path | None, task: Task, canvas: int) -> Tensor | None:
    if truth:
        return as_pictures(find_test_images(truth, task), task, canvas).pixels
    beside = find_test_images_beside(data, task, canvas)
    return None if beside is None else beside.pixels


def without(pictures: Pictures, test: Tensor, task: Task, log: Log) -> Pictures:
    """The pictures less those with the same pixels as one of the test images, uint8 `[N, 3, s, s]`, with a warning."""
    of_test = {image.numpy().tobytes() for image in test}
    clean = torch.tensor([image.numpy().tobytes() not in of_test for image in pictures.pixels])
    if not clean.all():
        log.warn(
            f"{task.name}: {int((~clean).sum()):,} of the training images are among the test images, with the same "
            "pixels, and are left out"
        )
    return Pictures(pictures.pixels[clean], pictures.labels[clean])


def _fingerprint(folder: Path) -> str:
    """Of the files below a folder: another where one came, went, or changed in size or time."""
    digest = hashlib.sha256()
    for path, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            found = Path(path, name).lstat()
            digest.update(f"{path}/{name} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()

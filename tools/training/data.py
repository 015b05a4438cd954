"""From a folder of people's images to what the training draws from: read, shrunk, checked, kept for the next start."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from submission.errors import InputFileError, OutputError, told_by_the_system
from submission.log import Log
from submission.tasks import Task
from tools.reading.image_folder import Pictures
from tools.reading.real_images import find_part, find_real_images
from tools.training.images import RealImages
from tools.training.layout import canvas_for
from tools.training.progress import load_whole, save_whole

# Fewer images of a class than this are warned of: docs/own-data.md has what training on so few gave.
FEW = 50


@dataclass(frozen=True)
class Sources:
    """Where images are: `data` those to train on, `truth` more to test on; and `output`, where they are kept."""

    data: Path
    truth: Path | None
    output: Path


def real_images(sources: Sources, tasks: Sequence[Task], device: torch.device, log: Log) -> list[RealImages]:
    """The training images of all tasks, those of one canvas together, in the order of the tasks, whose canvases rise.

    Test images, those that `data` names as such and those in `truth`, are left out where they are among them, with a
    warning. Raises InputFileError, and OutputError for the folder that keeps them.
    """
    found = []
    for task in tasks:
        canvas = canvas_for(task.size)
        pictures, left_out = _kept(sources, task, canvas, log)
        if left_out:
            log.warn(
                f"{task.name}: {left_out:,} of the training images are among the test images, with the same pixels, "
                "and are left out"
            )
        counts = pictures.labels.bincount(minlength=len(task.classes))
        fewest, least = task.classes[int(counts.argmin())].name, int(counts.min())
        if not least:
            raise InputFileError(f"{sources.data}: class {fewest!r} of {task.name} has no images")
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


def _kept(sources: Sources, task: Task, canvas: int, log: Log) -> tuple[Pictures, int]:
    """The images of a task, and how many were left out: as they were kept, or read now and kept for as long as the
    files stay as they are. Raises InputFileError."""
    file = sources.output / f"images_{task.name}.pt"
    try:
        folders = [folder for folder in (sources.data, sources.truth) if folder]
        key = repr((canvas, task, [_fingerprint(folder, sources.output) for folder in folders]))
        if (kept := _load(file)) and kept["key"] == key:
            return Pictures(kept["pixels"], kept["labels"]), kept["left_out"]
        pictures = find_part(sources.data, task, "train", canvas)
        if pictures is None:
            pictures = find_real_images(sources.data, task, "train", canvas)
            log.say(f"{sources.data} names no part for training: evaluate would test on the same images there")
        test = [find_part(sources.data, task, "test", canvas)]
        test += [find_real_images(sources.truth, task, "test", canvas)] if sources.truth else []
    except OSError as error:
        raise InputFileError(told_by_the_system(error)) from error
    known = {_digest(image) for of_folder in test if of_folder for image in of_folder.pixels}
    clean = torch.tensor([_digest(image) not in known for image in pictures.pixels])
    pictures, left_out = Pictures(pictures.pixels[clean], pictures.labels[clean]), int((~clean).sum())
    save_whole({"key": key, "pixels": pictures.pixels, "labels": pictures.labels, "left_out": left_out}, file)
    return pictures, left_out


def _load(file: Path) -> dict[str, Any] | None:
    """What was kept there; None where nothing was, or something else, which is then written over."""
    try:
        kept = load_whole(file) if file.exists() else None
    except OutputError:
        return None
    return kept if isinstance(kept, dict) and kept.keys() == {"key", "pixels", "labels", "left_out"} else None


def _digest(image: Tensor) -> bytes:
    return hashlib.sha256(image.numpy().tobytes()).digest()


def _fingerprint(folder: Path, output: Path) -> str:
    """Of the files below a folder, links followed: another where one came, went, or changed in size or time. Hidden
    folders, and the output where it is among them, are passed over."""
    digest, seen = hashlib.sha256(), {os.path.realpath(output)}
    for path, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(path, name)
            found = file.stat() if file.exists() else file.lstat()
            digest.update(f"{path}/{name} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()

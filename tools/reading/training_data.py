"""Real images to train on, read from the packed data folder (one grid a CIFAR-100 class, one zip of Tiny-ImageNet)."""

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from submission.errors import InputFileError

# `pixels` uint8 [N, 3, size, size] in RGB, `labels` int64 [N] in the evaluator's class order.
TrainingImages = tuple[Tensor, Tensor]
# Where a task's training images lie under the data folder.
SOURCES = {"cifar100": "cifar100/train", "tinyimagenet": "tinyimagenet/train_150_per_class.zip"}


def load_training_images(data: Path, task: str, size: int) -> TrainingImages:
    """The training images of `cifar100` or `tinyimagenet`, `size` pixels wide and high.

    CIFAR-100 is a folder of lossless grids `NNN_name.webp`, one per class, NNN the class index, tiles row-major;
    Tiny-ImageNet a zip of `wnid/name.JPEG`, where the sorted wnids number the classes. Raises InputFileError where
    they are missing or cannot be read.
    """
    path = data / SOURCES[task]
    try:
        if not path.exists():
            raise InputFileError(f"{path}: no training images of {task} there; give the data folder with --data")
        return read_grids(path, size) if path.is_dir() else _read_zip(path, size)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputFileError(f"{path}: training images cannot be read: {error}") from error


def read_grids(folder: Path, size: int) -> TrainingImages:
    """The images in a folder of grids, as above. Raises OSError or ValueError where one cannot be read."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in sorted(folder.glob("*.webp")):
        with Image.open(path) as opened:
            grid = np.asarray(opened.convert("RGB"))
        rows, columns = grid.shape[0] // size, grid.shape[1] // size
        tiles = grid.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
        images.append(tiles)
        labels += [int(path.name.split("_")[0])] * len(tiles)
    return _labelled(np.concatenate(images), labels)


def _read_zip(path: Path, size: int) -> TrainingImages:
    images: list[np.ndarray] = []
    wnids: list[str] = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            with Image.open(io.BytesIO(archive.read(name))) as opened:
                image = np.asarray(opened.convert("RGB"))
            if image.shape != (size, size, 3):
                raise ValueError(f"{name} is {image.shape[1]}x{image.shape[0]} pixels and not {size}x{size}")
            images.append(image)
            wnids.append(name.split("/")[0])
    number = {wnid: index for index, wnid in enumerate(sorted(set(wnids)))}
    return _labelled(np.stack(images), [number[wnid] for wnid in wnids])


def _labelled(images: np.ndarray, labels: list[int]) -> TrainingImages:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)

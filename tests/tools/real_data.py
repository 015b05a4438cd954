"""Real images from ../shared/data, in the forms that the tools take; tests that ask for them skip without it.

There CIFAR-100 is a folder of lossless grids `NNN_name.webp`, one per class, NNN the class index, tiles row-major;
Tiny-ImageNet a zip of `wnid/name.JPEG`, where the sorted wnids number the classes.
"""

import functools
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from submission.dataset.dataset_file import mean_and_std
from submission.tasks import Task
from tests.paths import SHARED

# `pixels` uint8 [N, 3, size, size], `labels` int64 [N].
Images = tuple[torch.Tensor, torch.Tensor]
FOLDER = SHARED / "data"


def real_subset(task: Task, ipc: int, seed: int) -> torch.Tensor:
    """So many training images per class drawn at random, normalised, by class: float32 [classes * ipc, 3, H, W]."""
    pixels, labels = _training_images(task.name, task.size)
    generator = np.random.default_rng(seed)
    chosen = [generator.choice(np.flatnonzero(labels == one.index), ipc, replace=False) for one in task.classes]
    return _normalised(pixels[torch.from_numpy(np.concatenate(chosen))], task)


def real_test_images(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of CIFAR-100's test images, normalised, and their classes."""
    pixels, labels = _test_images(task.size)
    return _normalised(pixels, task), labels


@functools.cache
def _training_images(task: str, size: int) -> Images:
    _skip_without_data()
    if task == "cifar100":
        return read_grids(FOLDER / "cifar100" / "train", size)
    return _read_zip(FOLDER / "tinyimagenet" / "train_150_per_class.zip")


@functools.cache
def _test_images(size: int) -> Images:
    _skip_without_data()
    return read_grids(FOLDER / "cifar100" / "test_dev", size)


def read_grids(folder: Path, size: int) -> Images:
    """The images of a folder of grids."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in sorted(folder.glob("*.webp")):
        with Image.open(path) as opened:
            grid = np.asarray(opened.convert("RGB"))
        rows, columns = grid.shape[0] // size, grid.shape[1] // size
        images.append(grid.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3))
        labels += [int(path.name.split("_")[0])] * len(images[-1])
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _read_zip(path: Path) -> Images:
    with zipfile.ZipFile(path) as archive:
        names = sorted(archive.namelist())
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    wnids = [name.split("/")[0] for name in names]
    number = {wnid: index for index, wnid in enumerate(sorted(set(wnids)))}
    labels = torch.tensor([number[wnid] for wnid in wnids])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def _skip_without_data() -> None:
    if not FOLDER.exists():
        pytest.skip("the real images (../shared/data) are not here")


def _normalised(pixels: torch.Tensor, task: Task) -> torch.Tensor:
    mean, std = mean_and_std(task)
    return (pixels / 255 - mean) / std

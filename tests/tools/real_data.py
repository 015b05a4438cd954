"""Real images from ../shared/data, in the forms that the tools take; tests that ask for them skip without it."""

import functools

import numpy as np
import pytest
import torch

from submission.dataset.dataset_file import mean_and_std
from submission.tasks import Task
from tests.paths import SHARED
from tools.reading.training_data import TrainingImages, load_training_images, read_grids

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
def _training_images(task: str, size: int) -> TrainingImages:
    _skip_without_data()
    return load_training_images(FOLDER, task, size)


@functools.cache
def _test_images(size: int) -> TrainingImages:
    _skip_without_data()
    return read_grids(FOLDER / "cifar100" / "test_dev", size)


def _skip_without_data() -> None:
    if not FOLDER.exists():
        pytest.skip("the real images (../shared/data) are not here")


def _normalised(pixels: torch.Tensor, task: Task) -> torch.Tensor:
    mean, std = mean_and_std(task)
    return (pixels / 255 - mean) / std

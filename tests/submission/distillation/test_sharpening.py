"""Images that are moved from a choice: nearer to what networks see in the pool, within the range of pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from submission.dataset.dataset_file import mean_and_std
from submission.dataset.rounds import Spool, prepare_spool
from submission.distillation import sharpening
from submission.distillation.convnet import ConvNet
from submission.tasks import Task, load_task

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step takes on a GPU would be minutes here."""
    for name, number in {"SAMPLED": 16, "LESSONS": 1, "BATCH": 16, "RATE": 0.05, "STEPS": 30}.items():
        monkeypatch.setattr(sharpening, name, number)


@pytest.fixture
def images() -> NDArray[np.uint8]:
    """Forty rounds of three classes at 16 px, each class of its own brightness, noisily."""
    dice = np.random.default_rng(0)
    middle = np.array([60, 120, 180])[None, :, None, None, None]
    return (middle + dice.normal(0, 30, (40, 3, 3, 16, 16))).clip(0, 255).astype(np.uint8)


def sharpen(folder: Path, task: Task, images: NDArray[np.uint8], steps: int) -> tuple[NDArray[np.uint8], int]:
    """The first two images of each class, moved towards all of them in so many steps at most."""
    left = iter(range(steps))
    prepare_spool(folder, 3, 16, {}, resume=False)
    with Spool(folder, 3, 16) as spool:
        for number, round_ in enumerate(images):
            spool.append(round_, number)
        return sharpening.sharpen(task, CPU, images[:2], spool.read(), lambda: next(left, None) is not None)


def features(task: Task, images: NDArray[np.uint8]) -> torch.Tensor:
    """Mean features of each class under a network that none of these images has seen, [classes, features]."""
    mean, std = mean_and_std(task)
    torch.manual_seed(123)
    network = ConvNet(3, 16)
    with torch.no_grad():
        normalised = (torch.from_numpy(images).flatten(0, 1).float() / 255 - mean) / std
        seen: torch.Tensor = network.features(normalised)
    return seen.view(*images.shape[:2], -1).mean(0)


def test_moved_images_are_nearer_to_the_pool(task_file: Path, images: NDArray[np.uint8], tmp_path: Path) -> None:
    task = load_task(str(task_file))
    moved, steps = sharpen(tmp_path / "spool", task, images, 15)
    assert steps == 15 and moved.shape == (2, 3, 3, 16, 16) and moved.dtype == np.uint8
    wanted = features(task, images)
    before, after = ((features(task, some) - wanted).norm() for some in (images[:2], moved))
    assert after < 0.9 * before
    torch.rand(7)
    again, _ = sharpen(tmp_path / "again", task, images, 15)
    assert np.array_equal(again, moved), "whatever was drawn at random meanwhile"


def test_without_a_step_nothing_moves(task_file: Path, images: NDArray[np.uint8], tmp_path: Path) -> None:
    random = torch.get_rng_state()
    moved, steps = sharpen(tmp_path / "spool", load_task(str(task_file)), images, 0)
    assert steps == 0 and np.array_equal(moved, images[:2])
    assert torch.equal(random, torch.get_rng_state()), "others' random numbers stay as they are"


def test_classes_are_moved_some_at_a_time_to_the_same_end(
    task_file: Path, images: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To other random numbers: what one class is moved by does not depend on others, but for what networks learn."""
    task = load_task(str(task_file))
    monkeypatch.setattr(sharpening, "PIXELS", 1)
    moved, _ = sharpen(tmp_path / "spool", task, images, 15)
    wanted = features(task, images)
    before, after = ((features(task, some) - wanted).norm() for some in (images[:2], moved))
    assert after < 0.9 * before

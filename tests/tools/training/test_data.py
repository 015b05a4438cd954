"""What people have in a folder, and what of it is trained on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from submission.dataset.dataset_file import mean_and_std
from submission.errors import InputFileError
from submission.log import Log
from submission.plan.budget import Budget
from submission.tasks import Task, load_task
from tools.training import data as module
from tools.training.data import Sources, real_images
from tools.training.images import RealImages

CPU = torch.device("cpu")
EACH = 3


@pytest.fixture
def task() -> Task:
    whole = load_task("cifar100")
    return replace(whole, name="two", classes=whole.classes[:2])


@pytest.fixture
def folder(task: Task, tmp_path: Path) -> Path:
    """Three training images and a test image of each class, in a folder per class."""
    dice = np.random.default_rng(0)
    for part, each in (("train", EACH), ("test", 1)):
        for one in task.classes:
            (tmp_path / "data" / part / one.name).mkdir(parents=True)
            for index in range(each):
                pixels = dice.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / one.name / f"{index}.png")
    return tmp_path / "data"


def log() -> Log:
    return Log("kept", Budget(1.0, 0.0))


def read(folder: Path, *tasks: Task, truth: Path | None = None, to: Log | None = None) -> list[RealImages]:
    output = folder.parent / "out"
    output.mkdir(exist_ok=True)
    return real_images(Sources(folder, truth, output), tasks, CPU, to or log())


def test_images_are_read_class_after_class(folder: Path, task: Task) -> None:
    (images,) = read(folder, task)
    assert images.canvas == 32 and images.counts.tolist() == [EACH, EACH]
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_tasks_of_one_canvas_stand_together(folder: Path, task: Task) -> None:
    small, large = replace(task, name="three"), replace(task, name="large", size=60)
    first, second = read(folder, task, small, large)
    assert (first.canvas, first.first, len(first.counts)) == (32, 0, 4)
    assert (second.canvas, second.first, len(second.counts)) == (64, 4, 2)
    assert second.labels.tolist() == [4, 4, 4, 5, 5, 5]


def test_what_was_kept_is_read_anew_where_it_is_damaged_or_of_another_task(folder: Path, task: Task) -> None:
    before = read(folder, task)[0]
    kept = folder.parent / "out" / "images_two.pt"
    for content in (b"x", b""):
        kept.write_bytes(content)
        assert torch.equal(read(folder, task)[0].pixels, before.pixels)
    torch.save([1], kept)
    assert torch.equal(read(folder, task)[0].pixels, before.pixels)
    swapped = replace(task, classes=tuple(replace(one, index=1 - one.index) for one in reversed(task.classes)))
    assert torch.equal(read(folder, swapped)[0].pixels, before.pixels.roll(EACH, 0))


def test_what_is_written_beside_the_images_is_none_of_them(
    folder: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "out").mkdir()
    sources = Sources(folder, None, folder / "out")
    real_images(sources, [task], CPU, log())
    (folder / "out" / "state.pt").touch()
    monkeypatch.setattr(module, "find_part", lambda *_: pytest.fail("read again"))
    real_images(sources, [task], CPU, log())


def test_images_that_may_not_be_read_are_said(folder: Path, task: Task) -> None:
    with pytest.raises(InputFileError, match="no such file"):
        read(folder.parent / "nowhere", task)
    with pytest.raises(InputFileError, match=r"0\.png"):
        read(folder / "train" / task.classes[0].name / "0.png", task)


def test_what_was_read_is_kept_until_a_file_changes(folder: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(folder, task)
    with monkeypatch.context() as patch:
        patch.setattr(module, "find_part", lambda *_: pytest.fail("read again"))
        assert torch.equal(read(folder, task)[0].pixels, before[0].pixels)
    Image.new("RGB", (32, 32), "red").save(folder / "train" / task.classes[0].name / "9.png")
    assert read(folder, task)[0].counts.tolist() == [EACH + 1, EACH]


def test_what_a_link_leads_to_is_a_file_that_may_change(folder: Path, task: Task) -> None:
    target, place = folder.parent / "red.png", folder / "train" / task.classes[0].name / "9.png"
    Image.new("RGB", (32, 32), "red").save(target)
    place.symlink_to(target)
    before = read(folder, task)[0].pixels
    Image.new("RGB", (32, 32), "blue").save(target)
    assert not torch.equal(read(folder, task)[0].pixels, before)


@pytest.mark.parametrize("place", ["test", "val", "elsewhere"])
def test_test_images_are_left_out_and_counted(place: str, folder: Path, task: Task) -> None:
    """Those beside the training images, and those that are named."""
    if place != "test":
        (folder / "test").rename(folder / place if place == "val" else folder.parent / place)
    truth = folder.parent / place if place == "elsewhere" else None
    tests = (truth or folder / place) / task.classes[1].name
    (tests / "0.png").write_bytes((folder / "train" / task.classes[1].name / "2.png").read_bytes())
    heard = log()
    (images,) = read(folder, task, truth=truth, to=heard)
    assert images.counts.tolist() == [EACH, EACH - 1]
    again = log()
    read(folder, task, truth=truth, to=again)  # which were kept
    for said in (heard, again):
        assert any("1 of the training images are among the test images" in text for text in said.warnings)


def test_few_images_are_warned_of(folder: Path, task: Task) -> None:
    heard = log()
    read(folder, task, to=heard)
    assert any("has 3 images: with fewer than" in text for text in heard.warnings)


def test_a_class_without_images_and_a_broken_one_are_named(folder: Path, task: Task) -> None:
    of_class = folder / "train" / task.classes[1].name
    (of_class / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputFileError, match=r"1\.png: no image that can be read"):
        read(folder, task)
    for file in of_class.iterdir():
        file.unlink()
    with pytest.raises(InputFileError, match="no images of class"):
        read(folder, task)


def test_the_organisers_form_is_read_back_to_pixels(folder: Path, task: Task) -> None:
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = mean_and_std(task)
    file = folder / "two_train.pt"
    torch.save({"images_train": (pixels / 255 - mean) / std, "labels_train": torch.tensor([1, 0, 1, 0])}, file)
    (images,) = read(folder, task)
    assert torch.equal(images.pixels, pixels[[1, 3, 0, 2]])
    torch.save({"images_train": (pixels / 255 - mean) / std, "labels_train": torch.tensor([1, 1, 1, 1])}, file)
    with pytest.raises(InputFileError, match="class 'apple' of two has no images"):
        read(folder, task)

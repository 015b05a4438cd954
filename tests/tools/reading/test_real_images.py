"""Real images in the forms that people have them in, to train on and to test on."""

import hashlib
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR100

from submission.dataset.dataset_file import mean_and_std
from submission.errors import InputFileError
from submission.tasks import Task, load_task
from tools.reading.real_images import find_part, find_real_images, find_test_images

CIFAR_TASK = load_task("cifar100")
TINY_TASK = load_task("tinyimagenet")


def pixels(count: int, size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def as_in_a_file(images: NDArray[np.uint8], task_name: str) -> torch.Tensor:
    mean, std = mean_and_std(load_task(task_name))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


@pytest.fixture
def cifar_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What torchvision leaves on disk, with four test images, under checksums of their own."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    data = pixels(4, 32).transpose(0, 3, 1, 2).reshape(4, -1)
    names = [one.name for one in CIFAR_TASK.classes]
    for name, content in {
        "train": {"data": data[:3], "fine_labels": [0, 41, 7]},
        "test": {"data": data, "fine_labels": [3, 99, 0, 41]},
        "meta": {"fine_label_names": names},
    }.items():
        (folder / name).write_bytes(pickle.dumps(content))
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return tmp_path


def test_cifar100_from_torchvision(cifar_folder: Path) -> None:
    found = find_test_images(cifar_folder, CIFAR_TASK)
    torch.testing.assert_close(found.images, as_in_a_file(pixels(4, 32), "cifar100"))
    assert found.images.is_contiguous()
    assert found.labels.tolist() == [3, 99, 0, 41]


def some_of(task: Task, *indices: int) -> Task:
    """A task of some of its classes, in another order of labels."""
    return replace(task, name="some", classes=tuple(replace(task.classes[i], index=n) for n, i in enumerate(indices)))


def test_classes_of_cifar100_are_found_in_it(cifar_folder: Path) -> None:
    """Also where the folder that is named is torchvision's own."""
    task = some_of(CIFAR_TASK, 41, 3, 0)
    found = find_test_images(cifar_folder / "cifar-100-python", task)
    assert found.labels.tolist() == [1, 2, 0]
    torch.testing.assert_close(found.images, as_in_a_file(pixels(4, 32)[[0, 2, 3]], "cifar100"))
    training = find_real_images(cifar_folder, task, "train", 32)
    assert training.labels.tolist() == [2, 0]
    assert torch.equal(training.pixels, torch.from_numpy(pixels(4, 32)[:2]).permute(0, 3, 1, 2))
    assert find_real_images(cifar_folder, task, "train", 64).pixels.shape == (2, 3, 64, 64)


def test_the_organisers_file_comes_first(cifar_folder: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    torch.save({"images_val": images, "labels_val": torch.tensor([5, 6])}, cifar_folder / "cifar100_test.pt")
    assert torch.equal(find_test_images(cifar_folder, CIFAR_TASK).images, images)


def test_changed_files_are_not_unpickled(cifar_folder: Path) -> None:
    (cifar_folder / "cifar-100-python" / "test").write_bytes(b"c__builtin__\neval\n(S'1/0'\ntR.")
    with pytest.raises(InputFileError, match="not torchvision's files"):
        find_test_images(cifar_folder, CIFAR_TASK)


def test_other_classes_are_refused(cifar_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = cifar_folder / "cifar-100-python" / "meta"
    meta.write_bytes(pickle.dumps({"fine_label_names": ["cat"] * 100}))
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": hashlib.md5(meta.read_bytes()).hexdigest()})
    with pytest.raises(InputFileError, match="its classes are not those of cifar100"):
        find_test_images(cifar_folder, CIFAR_TASK)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """An unpacked Tiny-ImageNet with three validation images, one of them grey."""
    images = tmp_path / "tiny-imagenet-200" / "val" / "images"
    images.mkdir(parents=True)
    colours = pixels(2, 64)
    # In PNG under the usual names, so that the pixels come back as they were.
    Image.fromarray(colours[0]).save(images / "val_0.JPEG", format="PNG")
    Image.fromarray(colours[1]).save(images / "val_1.JPEG", format="PNG")
    Image.fromarray(colours[0, :, :, 0]).save(images / "val_2.JPEG", format="PNG")
    lines = [f"val_{i}.JPEG\t{TINY_TASK.classes[index].wnid}\t0\t0\t62\t62\n" for i, index in enumerate((7, 0, 199))]
    (images.parent / "val_annotations.txt").write_text("".join(lines))
    (images.parent.parent / "wnids.txt").write_text("".join(f"{one.wnid}\n" for one in TINY_TASK.classes))
    return tmp_path


def test_tiny_imagenet_unpacked(tiny_folder: Path) -> None:
    found = find_test_images(tiny_folder, some_of(TINY_TASK, 0, 7, 199))
    colours = pixels(2, 64)
    grey = colours[:1, :, :, :1].repeat(3, axis=3)
    torch.testing.assert_close(found.images, as_in_a_file(np.concatenate([colours, grey]), "tinyimagenet"))
    assert found.labels.tolist() == [1, 0, 2]


def test_classes_of_tiny_imagenet_are_found_in_it(tiny_folder: Path) -> None:
    where = tiny_folder / "tiny-imagenet-200"
    task = some_of(TINY_TASK, 199, 7)
    assert find_test_images(tiny_folder, task).labels.tolist() == [1, 0]
    # As `init` writes it, from names alone.
    task = replace(task, classes=tuple(replace(one, wnid=None) for one in task.classes))
    assert find_test_images(tiny_folder, task).labels.tolist() == [1, 0]
    for index, image in zip((7, 199, 5), pixels(3, 64), strict=True):
        folder = where / "train" / str(TINY_TASK.classes[index].wnid) / "images"
        folder.mkdir(parents=True)
        Image.fromarray(image).save(folder / "0.JPEG", format="PNG")
    shutil.rmtree(where / "val")
    assert find_part(where, task, "test", 64) is None
    training = find_real_images(where, task, "train", 64)
    assert training.labels.tolist() == [0, 1]
    assert torch.equal(training.pixels, torch.from_numpy(pixels(3, 64)[[1, 0]]).permute(0, 3, 1, 2))


def test_folders_of_parts_hold_one_part_each(tmp_path: Path) -> None:
    """`train` is a class of CIFAR-100, too."""
    task, images = some_of(CIFAR_TASK, 90, 0), pixels(6, 32)
    for number, part in enumerate(("train", "test")):
        for index, one in enumerate(task.classes):
            (tmp_path / part / one.name).mkdir(parents=True)
            Image.fromarray(images[2 * number + index]).save(tmp_path / part / one.name / "0.png")
    found = find_real_images(tmp_path, task, "train", 32)
    assert torch.equal(found.pixels, torch.from_numpy(images[:2]).permute(0, 3, 1, 2))
    torch.testing.assert_close(find_test_images(tmp_path, task).images, as_in_a_file(images[2:4], "cifar100"))
    shutil.rmtree(tmp_path / "test")
    assert find_part(tmp_path, task, "test", 32) is None
    # Without parts, `train` is that class.
    shutil.rmtree(tmp_path / "train")
    for index, one in enumerate(task.classes):
        (tmp_path / one.name).mkdir()
        Image.fromarray(images[4 + index]).save(tmp_path / one.name / "0.png")
    assert find_real_images(tmp_path, task, "train", 32).labels.tolist() == [0, 1]
    assert len(find_test_images(tmp_path, task).labels) == 2 and find_part(tmp_path, task, "test", 32) is None


@pytest.mark.parametrize("inside", ["", "images"])
def test_tiny_imagenet_sorted_into_folders(inside: str, tiny_folder: Path) -> None:
    """As scripts on the web sort it, the list left where it was."""
    val = tiny_folder / "tiny-imagenet-200" / "val"
    shutil.rmtree(val / "images")
    for one, image in zip(TINY_TASK.classes, pixels(200, 64), strict=True):
        (val / str(one.wnid) / inside).mkdir(parents=True)
        Image.fromarray(image).save(val / str(one.wnid) / inside / "val_0.png")
    found = find_test_images(tiny_folder, TINY_TASK)
    assert found.labels.tolist() == list(range(200))
    torch.testing.assert_close(found.images, as_in_a_file(pixels(200, 64), "tinyimagenet"))


def test_a_blank_line_in_the_list_of_tiny_imagenet_is_nothing(tiny_folder: Path) -> None:
    listing = tiny_folder / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    task = some_of(TINY_TASK, 0, 7, 199)
    before = find_test_images(tiny_folder, task)
    listing.write_text(listing.read_text() + "\n")
    assert torch.equal(find_test_images(tiny_folder, task).labels, before.labels)


def test_a_class_that_tiny_imagenet_has_no_image_of_is_named(tiny_folder: Path) -> None:
    for classes in ((0, 5), (5, 6)):
        with pytest.raises(InputFileError, match=f"class {TINY_TASK.classes[5].name!r} of .* has no images there"):
            find_test_images(tiny_folder, some_of(TINY_TASK, *classes))


def test_a_pipe_in_the_place_of_tiny_imagenets_list_is_no_list(tiny_folder: Path) -> None:
    listing = tiny_folder / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    listing.unlink()
    os.mkfifo(listing)
    with pytest.raises(InputFileError, match="not a file"):
        find_test_images(tiny_folder, TINY_TASK)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("val_9.JPEG\tn01443537\n", "cannot be read"),
        ("val_0.JPEG\tn99999999\n", "names a class 'n99999999'"),
        ("val_0.JPEG\n", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_a_damaged_tiny_imagenet(line: str, reason: str, tiny_folder: Path) -> None:
    (tiny_folder / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(line)
    with pytest.raises(InputFileError, match=reason) as caught:
        find_test_images(tiny_folder, TINY_TASK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("task", "folder"), [("cifar100", "cifar-100-python"), ("tinyimagenet", "tiny-imagenet-200")])
def test_nothing_there(task: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=f"{task}_test.pt: no such file, nor is there {folder}"):
        find_test_images(tmp_path, load_task(task))

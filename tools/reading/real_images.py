"""The real images of a task, to train on or to test on, in whichever of the usual forms they lie in a folder."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR100

from submission.dataset.dataset_file import mean_and_std
from submission.errors import InputFileError
from submission.machine.disk import read_bytes
from submission.tasks import Task, load_task
from tools.reading.image_folder import Pictures, find_images, read_class_folders, read_images
from tools.reading.tensor_files import LabelledImages, read_labelled

Part = Literal["train", "test"]
# Folders that hold a part of a data set, one folder per class in each.
PART_FOLDERS: dict[Part, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
TINY_IMAGENET = "tiny-imagenet-200"
# Bytes of a list of images and their classes at most: Tiny-ImageNet's has 0.3 million.
MOST_LISTING = 1 << 24
# Tensors are resized so many at once.
RESIZED_AT_ONCE = 2048


def find_test_images(folder: Path, task: Task) -> LabelledImages:
    """The test set of the task, normalised: the first of these that the folder holds.

    - `NAME_test.pt`, the organisers' form, used as it is;
    - torchvision's download of CIFAR-100 (`cifar-100-python/`, checked by MD5), its test part, for classes of it;
    - the unpacked Tiny-ImageNet (`tiny-imagenet-200/`), its validation part, for classes of it: the test part has no
      labels;
    - a folder per class with images of any size, in `NAME/test/`, `NAME/val/`, `test/`, `val/`, `NAME/` or in the
      folder itself.

    Raises InputFileError where there is none of them, or what there is cannot be read.
    """
    if (file := _tensors(folder, task, "test")).is_symlink() or file.exists():
        return read_labelled(file, task, "val")
    return _normalised(find_real_images(folder, task, "test", task.size), task)


def find_real_images(folder: Path, task: Task, part: Part, size: int) -> Pictures:
    """The images of a part at `size` pixels, in the forms of `find_test_images`, or in these on their training side:
    `NAME_train.pt` (a dict of `images_train` and `labels_train`), `train` of torchvision's download and of
    Tiny-ImageNet, and folders per class in `NAME/train/`, `train/`, `NAME/` or the folder itself.

    Raises InputFileError as `find_test_images` does; OSError.
    """
    found = find_part(folder, task, part, size)
    found = found or read_class_folders(folder / task.name, task, size) or read_class_folders(folder, task, size)
    if found is None:
        published = {"cifar100": f"{CIFAR100.base_folder}/, or ", "tinyimagenet": f"{TINY_IMAGENET}/, or "}
        raise InputFileError(
            f"{_tensors(folder, task, part)}: no such file, nor is there {published.get(task.name, '')}a folder "
            f"per class, such as {folder / task.name / task.classes[0].name}"
        )
    return found


def find_part(folder: Path, task: Task, part: Part, size: int) -> Pictures | None:
    """The same, but of the forms alone that say which part they are; None where there is none of them."""
    if (file := _tensors(folder, task, part)).is_symlink() or file.exists():
        return _as_pictures(read_labelled(file, task, "val" if part == "test" else "train"), task, size)
    of_cifar100 = {one.name for one in load_task("cifar100").classes}
    if (cifar := _inside(folder, CIFAR100.base_folder)) and of_cifar100.issuperset(one.name for one in task.classes):
        return _cifar100(cifar, task, part, size)
    if (tiny := _inside(folder, TINY_IMAGENET)) and (known := _with_wnids(task)):
        if part == "train":
            return read_class_folders(tiny / "train", known, size)
        return _tiny_imagenet(tiny, known, size) if (tiny / "val").exists() else None
    for parent in (folder / task.name, folder):
        for name in PART_FOLDERS[part]:
            if found := read_class_folders(parent / name, task, size):
                return found
    return None


def _tensors(folder: Path, task: Task, part: Part) -> Path:
    return folder / f"{task.name}_{part}.pt"


def _inside(folder: Path, name: str) -> Path | None:
    """The folder of that name in a folder, or the folder itself where that is its name."""
    return next((path for path in (folder / name, folder) if path.name == name and path.is_dir()), None)


def _cifar100(where: Path, task: Task, part: Part, size: int) -> Pictures:
    try:
        found = CIFAR100(where.parent, train=part == "train")
    except RuntimeError as error:
        raise InputFileError(f"{where}: not torchvision's files, whole ({error})") from error
    index = {one.name: one.index for one in task.classes}
    if not index.keys() <= set(found.classes):
        raise InputFileError(f"{where}: its classes are not those of {task.name}")
    own = torch.tensor([index.get(name, -1) for name in found.classes])
    labels = own[torch.tensor(found.targets)]
    pixels = torch.from_numpy(found.data).permute(0, 3, 1, 2)
    return Pictures(resized(pixels[labels >= 0], size), labels[labels >= 0])


def _with_wnids(task: Task) -> Task | None:
    """The task with a WordNet id for every class, its own or that of Tiny-ImageNet's class of that name; None where
    there is none for one of them."""
    ids = {one.name: one.wnid for one in load_task("tinyimagenet").classes}
    classes = tuple(replace(one, wnid=one.wnid or ids.get(one.name)) for one in task.classes)
    return replace(task, classes=classes) if all(one.wnid for one in classes) else None


def _tiny_imagenet(where: Path, task: Task, size: int) -> Pictures:
    """The validation part, as the archive unpacks, or with `val/` sorted into a folder per class."""
    index = {one.wnid: one.index for one in task.classes}
    images, listing = where / "val" / "images", where / "val" / "val_annotations.txt"
    there = find_images(images) if images.is_dir() else []
    if not there and (found := read_class_folders(where / "val", task, size)):
        return found
    try:
        all_ids = where / "wnids.txt"
        others = {line.strip() for line in _read_lines(all_ids)} if all_ids.is_file() else set()
        lines = [line for line in _read_lines(listing) if line.strip()]
        rows = [(images / name, wnid) for name, wnid, *_ in (line.split("\t") for line in lines)]
    except (OSError, ValueError) as error:
        raise InputFileError(f"{listing}: cannot be read as lines of an image, a tab and a class ({error})") from error
    if unknown := next((wnid for _, wnid in rows if wnid not in index and wnid not in others), None):
        raise InputFileError(f"{listing} names a class {unknown!r} that {task.name} does not have")
    if sorted(file for file, _ in rows) != there:
        one = next(iter(sorted({file for file, _ in rows} ^ set(there))), "each of them once")
        raise InputFileError(f"{listing}: the images it names cannot be read: {one} is not in it and in {images}")
    own = [(file, index[wnid]) for file, wnid in rows if wnid in index]
    if lacking := set(index.values()) - {label for _, label in own}:
        raise InputFileError(f"{listing}: class {task.classes[min(lacking)].name!r} of {task.name} has no images there")
    return Pictures(read_images([file for file, _ in own], size), torch.tensor([label for _, label in own]))


def _read_lines(file: Path) -> list[str]:
    if file.exists() and not file.is_file():
        raise ValueError("not a file")  # a pipe would never end
    return read_bytes(file, MOST_LISTING).decode("utf-8-sig").splitlines()


def resized(pixels: Tensor, size: int) -> Tensor:
    """uint8 images `[N, 3, h, w]` at `size` pixels, antialiased; as they are where they have that size."""
    if pixels.shape[-1] == size:
        return pixels.contiguous()
    parts = []
    for part in torch.split(pixels, RESIZED_AT_ONCE):  # in floating point: on a GPU there is no other
        smaller = F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        parts.append(smaller.round().clamp(0, 255).byte())
    return torch.cat(parts)


def _normalised(found: Pictures, task: Task) -> LabelledImages:
    mean, std = mean_and_std(task)
    return LabelledImages(found.pixels.float().div_(255).sub_(mean).div_(std), found.labels)


def _as_pictures(found: LabelledImages, task: Task, size: int) -> Pictures:
    """Normalised images as the pixels that they were, at `size` pixels."""
    mean, std = mean_and_std(task)
    pixels = torch.cat(
        [
            ((part.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            for part in torch.split(found.images, RESIZED_AT_ONCE)
        ]
    )
    return Pictures(resized(pixels, size), found.labels)

"""The real test images of a task, in whichever of the usual forms they lie in a folder."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.datasets import CIFAR100

from submission.dataset.dataset_file import mean_and_std
from submission.errors import InputFileError
from submission.tasks import Task
from tools.reading.image_folder import find_images, read_class_folders, read_image
from tools.reading.tensor_files import LabelledImages, read_truth

TINY_IMAGENET = "tiny-imagenet-200"


def find_reference_data(folder: Path, task: Task) -> LabelledImages:
    """The test set of the task, normalised: the first of these that the folder holds.

    - `NAME_test.pt`, the organisers' form, used as it is;
    - for `cifar100`, torchvision's download (`cifar-100-python/`, checked by MD5), its test part;
    - for `tinyimagenet`, the unpacked archive (`tiny-imagenet-200/`), its validation part: the test part has no labels;
    - a folder per class with images of any size, in `NAME/` or in the folder itself.

    Raises InputFileError where there is none of them, or what there is cannot be read.
    """
    file = folder / f"{task.name}_test.pt"
    if file.is_symlink() or file.exists():
        return read_truth(file, task)
    if task.name == "cifar100" and (folder / CIFAR100.base_folder).is_dir():
        return _cifar100(folder, task)
    if task.name == "tinyimagenet" and (folder / TINY_IMAGENET).is_dir():
        return _tiny_imagenet(folder / TINY_IMAGENET, task)
    found = read_class_folders(folder / task.name, task) or read_class_folders(folder, task)
    if found is None:
        published = {"cifar100": f"{CIFAR100.base_folder}/, or ", "tinyimagenet": f"{TINY_IMAGENET}/, or "}
        raise InputFileError(
            f"{file}: no such file, nor is there {published.get(task.name, '')}a folder per class, such as "
            f"{folder / task.name / task.classes[0].name}"
        )
    return found


def _cifar100(folder: Path, task: Task) -> LabelledImages:
    try:
        found = CIFAR100(folder, train=False)
    except RuntimeError as error:
        raise InputFileError(f"{folder / CIFAR100.base_folder}: not torchvision's files, whole ({error})") from error
    if found.classes != [one.name for one in task.classes]:
        raise InputFileError(f"{folder / CIFAR100.base_folder}: its classes are not those of {task.name}")
    return _normalised(found.data, torch.tensor(found.targets), task)


def _tiny_imagenet(folder: Path, task: Task) -> LabelledImages:
    """As the archive unpacks, or with `val/` sorted into a folder per class."""
    index = {one.wnid: one.index for one in task.classes}
    images, listing = folder / "val" / "images", folder / "val" / "val_annotations.txt"
    there = find_images(images) if images.is_dir() else []
    if not there and (found := read_class_folders(folder / "val", task)):
        return found
    try:
        lines = [line for line in listing.read_text("utf-8-sig").splitlines() if line.strip()]
        rows = [(images / name, wnid) for name, wnid, *_ in (line.split("\t") for line in lines)]
        labels = torch.tensor([index[wnid] for _, wnid in rows])
    except (OSError, ValueError) as error:
        raise InputFileError(f"{listing}: cannot be read as lines of an image, a tab and a class ({error})") from error
    except KeyError as error:
        raise InputFileError(f"{listing} names a class {error} that {task.name} does not have") from error
    named = [file for file, _ in rows]
    if sorted(named) != there:
        one = next(iter(sorted(set(named) ^ set(there))), "each of them once")
        raise InputFileError(f"{listing}: the images it names cannot be read: {one} is not in it and in {images}")
    return _normalised(np.stack([read_image(file, task.size) for file in named]), labels, task)


def _normalised(pixels: NDArray[np.uint8], labels: torch.Tensor, task: Task) -> LabelledImages:
    """From uint8 [N, H, W, 3]."""
    mean, std = mean_and_std(task)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return LabelledImages(images.div_(255).sub_(mean).div_(std), labels)

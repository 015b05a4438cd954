"""Files that other people made: a submission (`cifar100.pt`) and the organisers' test sets (`cifar100_test.pt`).

Nothing in them is trusted. The archive's directory and the pickle inside are looked at before torch opens it, no code
in it runs, and the tensors stay mapped from the file: a claim about size costs no memory before it has been checked.
"""

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from submission.errors import InputFileError, first_line
from submission.tasks import Task

# The pickle in an archive with a tensor or two takes a few hundred bytes; all else in it are raw numbers.
MAX_PICKLE_BYTES = 1 << 16
# What the pickle of dense tensors, alone or in a dict, refers to; beside these the storage classes, torch.*Storage.
KNOWN_NAMES = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"}
# Times that tuples are used again at most: each may double what is to be looked up.
MOST_TUPLES = 16
# What imports otherwise, or leaves open what is kept for later.
NEVER_SAVED = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "MEMOIZE", "DUP", "POP", "POP_MARK"}
# Numbers looked at together when searching for NaN and infinity: 16 MB of float32.
NUMBERS_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class LabelledImages:
    """Normalised images, float32 or float16 [N, 3, H, W] on the CPU, with their classes, int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor


def read_submission(path: Path, task: Task) -> LabelledImages:
    """The training set in a submission's file: one tensor, classes * IPC images, an image's class told by its place.

    The images stay mapped from the file. Raises InputFileError, one line with the path, for anything else.
    """
    images = _checked_images(_load(path), task, path, "the file")
    classes = len(task.classes)
    ipc, rest = divmod(len(images), classes)
    if rest or not ipc:
        _refuse(path, f"{len(images):,} images, which is no multiple of the {classes} classes of {task.name}")
    return LabelledImages(images, torch.arange(classes).repeat_interleave(ipc))


def read_labelled(path: Path, task: Task, part: str) -> LabelledImages:
    """A test set in the organisers' form, a dict of `images_val` and `labels_val`; or with `part` "train", a training
    set in the same form, whose names end so.

    The images stay mapped from the file. Raises InputFileError, one line with the path, for anything else.
    """
    content = _load(path)
    of_images, of_labels = f"images_{part}", f"labels_{part}"
    if not isinstance(content, dict) or not {of_images, of_labels} <= content.keys():
        _refuse(path, f"not a reference file, which is a dict of {of_images} and {of_labels}")
    images, labels = _checked_images(content[of_images], task, path, of_images), content[of_labels]
    if not isinstance(labels, torch.Tensor) or labels.dtype not in (torch.int64, torch.int32, torch.uint8):
        _refuse(path, f"{of_labels} is not a tensor of integers")
    if labels.shape != images.shape[:1]:
        _refuse(path, f"{of_labels} has shape {list(labels.shape)}, but there are {len(images):,} images")
    labels = labels.to(torch.int64)
    if not len(labels) or labels.min() < 0 or labels.max() >= len(task.classes):
        _refuse(path, f"{of_labels} must hold classes 0 to {len(task.classes) - 1} of {task.name}, one per image")
    return LabelledImages(images, labels)


def _load(path: Path) -> object:
    """The object in a file that torch.save wrote, its tensors mapped; InputFileError for any other file."""
    _check_archive(path)
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001  a malformed file can make the reader raise anything
        _refuse(path, f"torch cannot read it ({first_line(error)[:120]})")
    return content


def _check_archive(path: Path) -> None:
    """Refuse a file that could run something or take memory while it is opened."""
    try:
        if not path.is_file():
            _refuse(path, "not a file" if path.exists() else "no such file")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(set(names)) < len(names):
                _refuse(path, "two entries of its archive have one name")
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                _refuse(path, "its archive is compressed or encrypted, which torch.save never does")
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                _refuse(path, "not a file of one tensor or a dict of tensors written by torch.save")
            pickle = archive.read(pickles[0])
    except zipfile.BadZipFile as error:
        _refuse(path, f"not a whole file of torch.save, PyTorch 1.6 or newer ({first_line(error)[:120]})")
    except InputFileError:
        raise
    except Exception as error:  # noqa: BLE001  as in `_load`
        _refuse(path, f"cannot be read ({first_line(error)[:120]})")
    for name in _names(pickle, path):
        if name not in KNOWN_NAMES and not (name.startswith("torch ") and name.endswith("Storage")):
            _refuse(path, f"it refers to {name.replace(' ', '.')[:80]!r}, which no file of plain dense tensors does")


def _names(pickle: bytes, path: Path) -> list[str]:
    """What the pickle found in a file imports, as "module name". Refuses one that uses tuples again and again: a few
    dozen, each of the one before, twice, are a key that takes for ever to look up."""
    names, tuples, again, before = [], set[object](), 0, ""
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "GLOBAL":
                names.append(str(argument))
            elif opcode.name in NEVER_SAVED:
                _refuse(path, f"its pickle has {opcode.name}, which torch.save never writes without a pickle_protocol")
            elif opcode.name.endswith("PUT") and before.startswith("TUPLE"):
                tuples.add(argument)
            again += opcode.name.endswith("GET") and argument in tuples
            if again > MOST_TUPLES:
                _refuse(path, "its pickle uses tuples again and again, which no file of plain dense tensors does")
            if not opcode.name.endswith("PUT") and opcode.name != "PROTO":  # which leave in place what is there
                before = opcode.name
    except (ValueError, IndexError, OverflowError) as error:
        _refuse(path, f"its pickle is damaged ({first_line(error)[:120]})")
    return names


def _checked_images(images: object, task: Task, path: Path, what: str) -> torch.Tensor:
    """Refuse all but finite float32 or float16 [N, 3, size, size] whose numbers are really in the file."""
    wanted = f"float32 or float16 [N, 3, {task.size}, {task.size}]"
    if not isinstance(images, torch.Tensor):
        _refuse(path, f"{what} holds a {type(images).__name__}, not one tensor, {wanted}")
    dtype = str(images.dtype).removeprefix("torch.")
    if images.layout != torch.strided or images.dtype not in (torch.float32, torch.float16):
        _refuse(path, f"{what} holds {dtype} ({images.layout}), not {wanted}")
    if images.ndim != 4 or images.shape[1:] != (3, task.size, task.size):
        _refuse(path, f"{what} has shape {list(images.shape)}, not {wanted}")
    if images.is_neg():
        _refuse(path, f"{what} holds numbers that are to be read with the other sign: save what clone() makes of them")
    if images.numel() * images.element_size() > images.untyped_storage().nbytes():
        _refuse(path, f"{what} claims {images.numel():,} numbers, more than are stored")
    images = images.detach()
    rows = max(1, NUMBERS_PER_CHUNK // (3 * task.size**2))
    if not all(torch.isfinite(chunk).all() for chunk in torch.split(images, rows)):
        _refuse(path, f"{what} holds NaN or infinity")
    return images


def _refuse(path: Path, reason: str) -> NoReturn:
    raise InputFileError(f"{path}: {reason}")

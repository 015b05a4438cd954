"""Files from strangers: good ones are read as they are, bad ones get one line, and nothing in them runs."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from submission.errors import InputFileError
from submission.tasks import Task, load_task
from tests.paths import ROOT
from tools.reading.tensor_files import read_labelled, read_submission

GOOD = torch.arange(6 * 3 * 16 * 16, dtype=torch.float32).view(6, 3, 16, 16) / 1000


@pytest.fixture
def task(task_file: Path) -> Task:
    return load_task(str(task_file))


@pytest.mark.parametrize(
    "images",
    [
        GOOD,
        GOOD.half(),
        torch.nn.Parameter(GOOD),
        GOOD.contiguous(memory_format=torch.channels_last),
        torch.cat([GOOD, GOOD])[3:9],
    ],
    ids=["float32", "float16", "parameter", "channels last", "view"],
)
def test_good_submissions(images: torch.Tensor, task: Task, tmp_path: Path) -> None:
    file = tmp_path / "tiny.pt"
    torch.save(images, file)
    read = read_submission(file, task)
    assert torch.equal(read.images, images)
    assert read.images.dtype == images.dtype
    assert not read.images.requires_grad
    assert read.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_good_truth(task: Task, tmp_path: Path) -> None:
    file = tmp_path / "tiny_test.pt"
    same = (0.5, 0.5, 0.5)
    torch.save({"images_val": GOOD, "labels_val": torch.tensor([2, 0, 1, 1, 0, 2]), "mean": same, "std": same}, file)
    read = read_labelled(file, task, "val")
    assert torch.equal(read.images, GOOD)
    assert read.labels.tolist() == [2, 0, 1, 1, 0, 2]


class Trap:
    """Creates a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


class Hoard:
    """Asks for a terabyte where it is unpickled, by means that torch's restricted reader allows."""

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (1 << 40,)


def repack(file: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None]) -> None:
    """The archive of a good file, written anew by `change(old, new)`."""
    torch.save(GOOD, file.with_suffix(".good"))
    with zipfile.ZipFile(file.with_suffix(".good")) as old, zipfile.ZipFile(file, "w") as new:
        change(old, new)


def compressed(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for entry in old.infolist():
        new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)


def bomb(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    """A third of a megabyte that unpacks to a third of a gigabyte of numbers."""
    for entry in old.infolist():
        content = bytes(1 << 28) if entry.filename.endswith("data/0") else old.read(entry)
        new.writestr(entry.filename, content, zipfile.ZIP_DEFLATED, compresslevel=1)


def without_numbers(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for entry in old.infolist():
        new.writestr(entry.filename, b"" if entry.filename.endswith("data/0") else old.read(entry))


def with_two_pickles(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
    for entry in old.infolist():
        new.writestr(entry.filename, old.read(entry))
        if entry.filename.endswith("data.pkl"):
            new.writestr(f"other/{entry.filename}", old.read(entry))


def with_pickle(content: bytes) -> Callable[[zipfile.ZipFile, zipfile.ZipFile], None]:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else old.read(entry))

    return change


def truncated(file: Path) -> None:
    torch.save(GOOD, file)
    os.truncate(file, file.stat().st_size // 2)


def poisoned(value: float) -> torch.Tensor:
    images = GOOD.clone()
    images[5, 2, 15, 15] = value
    return images


def sizes_that_are_not_there(file: Path) -> None:
    """The archive's directory claims more of its pickle than there is."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = (60000).to_bytes(4, "little") * 2
    file.write_bytes(content)


def twice_as_large(between: bytes) -> bytes:
    """{((((), ()), ((), ())), ...): 1}: each tuple is the one before, twice, sixty times."""
    levels = [between + b"q" + bytes([index]) + b"h" + bytes([index]) + b"\x86" for index in range(60)]
    return b"".join([b"\x80\x02}))\x86", *levels, b"K\x01s."])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda file: torch.save(Trap(file.parent / "ran"), file), "refers to"),
    "code in a bare pickle": (
        lambda file: file.write_bytes(pickle.dumps(Trap(file.parent / "ran"))),
        "not a whole file",
    ),
    "code in protocol 4": (
        lambda file: torch.save(Trap(file.parent / "ran"), file, pickle_protocol=4),
        "without a pickle_protocol",
    ),
    "a terabyte of bytes": (lambda file: torch.save(Hoard(), file), "refers to"),
    "dict": (lambda file: torch.save({"images": GOOD}, file), "holds a dict"),
    "list": (lambda file: torch.save([GOOD], file), "holds a list"),
    "text": (lambda file: torch.save("images", file), "holds a str"),
    "sparse": (lambda file: torch.save(GOOD.to_sparse(), file), "refers to"),
    "quantised": (lambda file: torch.save(torch.quantize_per_tensor(GOOD, 1, 0, torch.qint8), file), "refers to"),
    "complex": (lambda file: torch.save(GOOD.to(torch.complex64), file), "complex64"),
    "bytes": (lambda file: torch.save(GOOD.to(torch.uint8), file), "uint8"),
    "float64": (lambda file: torch.save(GOOD.double(), file), "float64"),
    "no image axis": (lambda file: torch.save(GOOD.flatten(), file), "shape [4608]"),
    "wrong size": (lambda file: torch.save(GOOD[..., :8], file), "shape [6, 3, 16, 8]"),
    "channels at the end": (lambda file: torch.save(GOOD.permute(0, 2, 3, 1), file), "shape [6, 16, 16, 3]"),
    "negative": (lambda file: torch.save(torch._neg_view(GOOD), file), "the other sign"),
    "no images": (lambda file: torch.save(GOOD[:0], file), "0 images"),
    "unbalanced": (lambda file: torch.save(GOOD[:5], file), "5 images, which is no multiple of the 3 classes"),
    "NaN": (lambda file: torch.save(poisoned(float("nan")), file), "NaN or infinity"),
    "infinity": (lambda file: torch.save(poisoned(float("-inf")), file), "NaN or infinity"),
    "zero strides claiming terabytes": (
        lambda file: torch.save(GOOD[:1].expand(3 << 40, 3, 16, 16), file),
        "more than are stored",
    ),
    "missing": (lambda file: None, "no such file"),
    "folder": (lambda file: file.mkdir(), "not a file"),
    "pipe": (os.mkfifo, "not a file"),
    "link to itself": (lambda file: file.symlink_to(file), "no such file"),
    "empty": (lambda file: file.touch(), "not a whole file"),
    "noise": (lambda file: file.write_bytes(bytes(range(256)) * 99), "not a whole file"),
    "truncated": (truncated, "not a whole file"),
    "old format": (
        lambda file: torch.save(GOOD, file, _use_new_zipfile_serialization=False),
        "not a whole file",
    ),
    "compressed": (lambda file: repack(file, compressed), "compressed"),
    "bomb": (lambda file: repack(file, bomb), "compressed"),
    "numbers missing": (lambda file: repack(file, without_numbers), ""),
    "two pickles": (lambda file: repack(file, with_two_pickles), "not a file of one tensor"),
    "large pickle": (lambda file: repack(file, with_pickle(bytes(1 << 20))), "not a file of one tensor"),
    "damaged pickle": (lambda file: repack(file, with_pickle(b"\x80\x02X\xff\xff")), "pickle is damaged"),
    "pickle of nothing": (lambda file: repack(file, with_pickle(b"\x80\x02.")), "torch cannot read it"),
    "endless tuples": (lambda file: repack(file, with_pickle(b"\x80\x02" + b"(" * 60000 + b".")), ""),
    "a key of tuples of tuples": (lambda file: repack(file, with_pickle(twice_as_large(b""))), "again and again"),
    "the same, kept twice": (lambda file: repack(file, with_pickle(twice_as_large(b"q\xff"))), "again and again"),
    "the same, begun anew": (lambda file: repack(file, with_pickle(twice_as_large(b"\x80\x02"))), "again and again"),
    "sizes that are not there": (sizes_that_are_not_there, "cannot be read"),
    "archive of something else": (lambda file: zipfile.ZipFile(file, "w").writestr("a.txt", "a"), ""),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD)
def test_bad_submissions(name: str, task: Task, tmp_path: Path) -> None:
    make, reason = BAD[name]
    file = tmp_path / "tiny.pt"
    make(file)
    with pytest.raises(InputFileError) as caught:
        read_submission(file, task)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert reason in message
    assert "\n" not in message
    assert not (tmp_path / "ran").exists()


# Audits each file named on its command line; prints the exit codes, and by how many MB the peak of memory rose.
AUDIT_ALL = """
import json, sys
from pathlib import Path
from tools import audit
def peak(reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
task, found = sys.argv[1], {}
audit.main([str(Path(task).with_name("good.pt")), "--task", task])  # what the first call loads is not a file's doing
for file in sys.argv[2:]:
    before = peak(reset=True)
    found[file] = [audit.main([file, "--task", task]), peak() - before]
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of peak memory")
@pytest.mark.filterwarnings("ignore")
def test_bad_submissions_take_no_memory_and_one_line_each(task_file: Path, tmp_path: Path) -> None:
    torch.save(GOOD, tmp_path / "good.pt")
    files = []
    for name, (make, _) in BAD.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        files.append(folder / "tiny.pt")
        make(files[-1])
    finished = subprocess.run(
        [sys.executable, "-c", AUDIT_ALL, str(task_file), *map(str, files)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(finished.stdout.splitlines()[-1])
    assert len(found) == len(BAD) >= 25
    for file, (code, megabytes) in found.items():
        assert code == 6, file
        assert megabytes < 200, file
    lines = finished.stderr.splitlines()
    assert len(lines) == len(BAD)
    assert all(line.startswith("error: ") for line in lines)
    assert not list(tmp_path.glob("*/ran"))


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BAD_TRUTHS: dict[str, tuple[object, str]] = {
    "a submission": (GOOD, "not a reference file"),
    "other names": ({"images": GOOD, "labels": LABELS}, "not a reference file"),
    "labels as floats": ({"images_val": GOOD, "labels_val": LABELS.float()}, "not a tensor of integers"),
    "labels as a list": ({"images_val": GOOD, "labels_val": [0, 1, 2, 0, 1, 2]}, "not a tensor of integers"),
    "too few labels": ({"images_val": GOOD, "labels_val": LABELS[:5]}, "shape [5]"),
    "a class too many": ({"images_val": GOOD, "labels_val": LABELS + 1}, "classes 0 to 2"),
    "negative class": ({"images_val": GOOD, "labels_val": LABELS - 1}, "classes 0 to 2"),
    "no images": ({"images_val": GOOD[:0], "labels_val": LABELS[:0]}, "classes 0 to 2"),
    "NaN": ({"images_val": poisoned(float("nan")), "labels_val": LABELS}, "images_val holds NaN"),
}


@pytest.mark.parametrize("name", BAD_TRUTHS)
def test_bad_truths(name: str, task: Task, tmp_path: Path) -> None:
    content, reason = BAD_TRUTHS[name]
    file = tmp_path / "tiny_test.pt"
    torch.save(content, file)
    with pytest.raises(InputFileError) as caught:
        read_labelled(file, task, "val")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)

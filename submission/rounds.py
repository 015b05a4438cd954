"""The spool of finished rounds: uint8 on disk, so that memory does not grow with them.

Every rank appends to a file of its own, and anyone can read them all. A record is a round's images, its number and a
CRC-32 of both: what a file of the right length holds may still be torn, after a power cut, or on a network disk whose
pages arrive in any order.
"""

import json
import os
import shutil
import threading
import uuid
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from submission.errors import OutputError, UsageError
from submission.ranks import Place

NUMBER_BYTES, CHECKSUM_BYTES = 4, 4
# Bytes read at a time to check a record, which may be gigabytes long.
PIECE = 1 << 20


@dataclass(frozen=True)
class Rounds:
    """Finished rounds in the order of their `numbers` int64 [R], indexed as an array [R, classes, 3, size, size].

    Round i is in the file of `descriptors[i]`, from byte `offsets[i]`. Images are read one by one: pages of a mapped
    file would count as this process's memory.
    """

    numbers: NDArray[np.int64]
    descriptors: NDArray[np.int64]
    offsets: NDArray[np.int64]
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[np.uint8]:
        """Images uint8 [n, 3, size, size] by the places of their rounds [n] and their classes [n]. Raises OSError."""
        places, labels = index
        images = np.empty((len(places), *self.shape[1:]), np.uint8)
        image = images[0].nbytes
        sources = zip(self.descriptors[places].tolist(), (self.offsets[places] + labels * image).tolist(), strict=True)
        for place, (descriptor, offset) in zip(images, sources, strict=True):
            if os.preadv(descriptor, [place.data], offset) != image:
                raise OSError(0, "the spool is shorter than it was")
        return images

    def first(self, count: int) -> "Rounds":
        """Those with the lowest numbers."""
        return Rounds(self.numbers[:count], self.descriptors[:count], self.offsets[:count], self.shape)


def prepare_spool(folder: Path, classes: int, size: int, identity: Mapping[str, str], *, resume: bool) -> int:
    """Makes an empty spool, or with `resume` keeps the rounds of a run before. Returns how many there are or were.

    Raises UsageError where they were made of something else than `identity` says, and OutputError.
    """
    label, stride = folder / "identity.json", _stride((classes, 3, size, size))
    try:
        files = sorted(folder.glob("*.u8"))
        found = sum(file.stat().st_size // stride for file in files)
        if resume and found:
            _compare(label, identity)
            kept = [file for file in files if file.stem.startswith("before-")]
            for number, file in enumerate((file for file in files if file not in kept), len(kept)):
                file.rename(folder / f"before-{number}.u8")
            for path in folder.iterdir():
                if path.suffix != ".u8" and path != label:
                    path.unlink()
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            label.write_text(json.dumps(dict(identity), indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write to {folder.parent} ({error.strerror}): choose another --output") from error
    return found


def remove_if_empty(folder: Path) -> None:
    """Removes a spool that holds not even a part of a round."""
    if not any(file.stat().st_size for file in folder.glob("*.u8")):
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _File:
    """A spool file, open, of which so many records have been `seen`. Those of a run before have no `rank`."""

    descriptor: int
    rank: int | None
    seen: int = 0


class Spool:
    """Rounds of all ranks, each [classes, 3, size, size] uint8; this one's are appended, the others' looked for.

    `before` are the numbers of the rounds that a run before has left.
    """

    def __init__(self, folder: Path, classes: int, size: int, rank: int = 0) -> None:
        """Opens a prepared spool for a rank that has no rounds in it yet. Raises OutputError."""
        self.folder = folder
        self.shape = (classes, 3, size, size)
        self._places: dict[int, tuple[_File, int]] = {}
        self._looking = threading.Lock()
        self._path = folder / f"rank-{rank}.u8"
        try:
            self._own = _File(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), rank)
            self._files = {self._path: self._own}
            self._look("before-*.u8")
        except OSError as error:
            raise OutputError(f"cannot write to {folder.parent} ({error.strerror}): choose another --output") from error
        self.before = np.array(sorted(self._places), np.int64)

    @property
    def count(self) -> int:
        """Finished rounds known of."""
        return len(self._places)

    def append(self, images: NDArray[np.uint8], number: int) -> None:
        """Adds finished round `number`, [classes, 3, size, size]. Raises OutputError."""
        assert images.shape == self.shape and images.dtype == np.uint8
        content, name = np.ascontiguousarray(images).reshape(-1).data, number.to_bytes(NUMBER_BYTES, "little")
        checksum = zlib.crc32(name, zlib.crc32(content)).to_bytes(CHECKSUM_BYTES, "little")
        offset = end = self._own.seen * _stride(self.shape)
        try:
            for part in (content, memoryview(name + checksum)):
                while part:  # the system takes two gigabytes at a time, and on a nearly full disk what fits
                    written = os.pwrite(self._own.descriptor, part, end)
                    part, end = part[written:], end + written  # noqa: PLW2901
        except OSError as error:
            raise self._full(error.strerror) from error
        self._own.seen += 1
        self._places.setdefault(number, (self._own, offset))

    def sync(self) -> None:
        """Has the disk, and whoever shares it, see what was appended. Raises OSError."""
        os.fsync(self._own.descriptor)

    def look(self) -> None:
        """Takes in the rounds that other ranks have finished meanwhile. Raises OSError."""
        self._look("rank-*.u8")

    def read(self) -> Rounds:
        """All finished rounds known of."""
        places = sorted(self._places.copy().items())
        return Rounds(
            numbers=np.array([number for number, _ in places], np.int64),
            descriptors=np.array([file.descriptor for _, (file, _) in places], np.int64),
            offsets=np.array([offset for _, (_, offset) in places], np.int64),
            shape=self.shape,
        )

    def by_rank(self, count: int | None = None) -> dict[int, int]:
        """How many rounds known of, or of the first `count` of them, were made by which rank of this job."""
        first = sorted(self._places.copy().items())[:count]
        return dict(Counter(file.rank for _, (file, _) in first if file.rank is not None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the spool. Rounds that were not removed stay for `--resume`."""
        for file in self._files.values():
            os.close(file.descriptor)

    def remove(self) -> None:
        """Removes the spool from the disk: its rounds are in the file. At once, though others may still write there."""
        with suppress(OSError):
            shutil.rmtree(self.folder.rename(self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex}")))

    def _look(self, pattern: str) -> None:
        stride = _stride(self.shape)
        with self._looking:
            for path in self.folder.glob(pattern):
                if path not in self._files:
                    rank = int(path.stem.removeprefix("rank-")) if path.stem.startswith("rank-") else None
                    self._files[path] = _File(os.open(path, os.O_RDONLY), rank)
                file = self._files[path]
                while file is not self._own and os.fstat(file.descriptor).st_size >= (file.seen + 1) * stride:
                    number = _number(file.descriptor, file.seen * stride, stride)
                    if number is not None:
                        self._places.setdefault(number, (file, file.seen * stride))
                    elif file.rank is not None:
                        break  # the rest of it may be on its way
                    file.seen += 1

    def _full(self, reason: str | None) -> OutputError:
        size = _stride(self.shape) / 1e6
        return OutputError(
            f"cannot write {self._path} ({reason}): every round needs {size:.1f} MB there, and {self.count} of "
            "them are done; make room and go on with --resume"
        )


def share_of_rounds(cap: int, before: NDArray[np.int64], place: Place) -> NDArray[np.int64]:
    """The numbers of the rounds that fall to a rank, where there may be `cap` in all and some were made `before`.

    Those that are missing are dealt out in turn: without any before, rank k of N makes rounds k, k + N, k + 2N...
    """
    missing = np.setdiff1d(np.arange(cap + len(before)), before)[: max(0, cap - len(before))]
    return missing[place.rank :: place.ranks]


def _stride(shape: tuple[int, int, int, int]) -> int:
    """Bytes from one round to the next."""
    classes, channels, height, width = shape
    return classes * channels * height * width + NUMBER_BYTES + CHECKSUM_BYTES


def _number(descriptor: int, offset: int, stride: int) -> int | None:
    """The number of the round recorded there; None where its checksum does not match. Raises OSError."""
    end, checksum = offset + stride - NUMBER_BYTES - CHECKSUM_BYTES, 0
    for start in range(offset, end, PIECE):
        checksum = zlib.crc32(os.pread(descriptor, min(PIECE, end - start), start), checksum)
    name = os.pread(descriptor, NUMBER_BYTES, end)
    told = os.pread(descriptor, CHECKSUM_BYTES, end + NUMBER_BYTES)
    matches = zlib.crc32(name, checksum) == int.from_bytes(told, "little")
    return int.from_bytes(name, "little") if matches else None


def _compare(label: Path, identity: Mapping[str, str]) -> None:
    """Refuses to continue rounds that another job made, naming the difference."""
    try:
        theirs = json.loads(label.read_text())
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise UsageError(f"--resume: {label} is damaged; start anew without --resume")
    different = [
        f"{name} was {str(theirs.get(name))[:80]} and is now {value}"
        for name, value in identity.items()
        if theirs.get(name) != value
    ]
    if different:
        raise UsageError(
            f"--resume: the rounds in {label.parent} were made otherwise: {'; '.join(different)}; use the same, or "
            "start anew without --resume"
        )

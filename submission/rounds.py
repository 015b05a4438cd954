"""The spool of finished rounds: uint8 on disk, so that memory does not grow with them."""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from submission.errors import OutputError, UsageError

# A round is followed by its CRC-32: after a power cut, a file of the right length may still hold a torn round.
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Rounds:
    """The first `count` rounds of a spool, indexed as an array [count, classes, 3, size, size] would be.

    Images are read one by one: pages of a mapped file would count as this process's memory.
    """

    descriptor: int
    count: int
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[np.uint8]:
        """Images uint8 [n, 3, size, size] by their rounds [n] and classes [n]. Raises OSError."""
        rounds, labels = index
        images = np.empty((len(rounds), *self.shape[1:]), np.uint8)
        image, stride = images[0].nbytes, _stride(self.shape)
        offsets = (rounds * stride + labels * image).tolist()
        for place, offset in zip(images, offsets, strict=True):
            if os.preadv(self.descriptor, [place.data], offset) != image:
                raise OSError(0, "the spool is shorter than it was")
        return images


class Spool:
    """Rounds appended to one file, each [classes, 3, size, size] uint8, and the identity of what made them.

    `found` rounds were there from an interrupted run: continued with `resume`, removed without.
    """

    def __init__(self, folder: Path, classes: int, size: int, identity: Mapping[str, str], *, resume: bool) -> None:
        """Starts a spool in `folder`, or continues the one there, without a torn last round.

        Raises UsageError where it was made of something else than `identity` says, and OutputError.
        """
        self.folder = folder
        self.shape = (classes, 3, size, size)
        self.count = self.found = 0
        file, label = folder / "rounds.u8", folder / "identity.json"
        try:
            self.found = file.stat().st_size // _stride(self.shape) if file.exists() else 0
            if resume and self.found:
                _compare(label, identity)
                self._file = file.open("r+b", buffering=0)
                self.count = self.found = self._whole_rounds()
                self._file.truncate(self.count * _stride(self.shape))
            else:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                label.write_text(json.dumps(dict(identity), indent=1) + "\n")
                self._file = file.open("w+b", buffering=0)
        except OSError as error:
            raise OutputError(f"cannot write to {folder.parent} ({error.strerror}): choose another --output") from error

    def append(self, images: NDArray[np.uint8]) -> None:
        """Adds one finished round [classes, 3, size, size]. Raises OutputError."""
        assert images.shape == self.shape and images.dtype == np.uint8
        content = np.ascontiguousarray(images).tobytes()
        record = content + zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "little")
        try:
            written = os.pwrite(self._file.fileno(), record, self.count * len(record))
        except OSError as error:
            raise self._full(error.strerror) from error
        if written != len(record):
            raise self._full("disk full")
        self.count += 1

    def read(self) -> Rounds:
        """All finished rounds."""
        return Rounds(self._file.fileno(), self.count, self.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the spool. Rounds that were not removed stay for `--resume`."""
        self._file.close()
        if not self.count:
            self.remove()

    def remove(self) -> None:
        """Removes the spool from the disk: its rounds are in the file."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _full(self, reason: str | None) -> OutputError:
        size = _stride(self.shape) / 1e6
        return OutputError(
            f"cannot write {self._file.name} ({reason}): every round needs {size:.1f} MB there, and {self.count} of "
            "them are done; make room and go on with --resume"
        )

    def _whole_rounds(self) -> int:
        """Rounds up to the first whose checksum is wrong."""
        for number in range(self.found):
            record = os.pread(self._file.fileno(), _stride(self.shape), number * _stride(self.shape))
            if zlib.crc32(record[:-CHECKSUM_BYTES]) != int.from_bytes(record[-CHECKSUM_BYTES:], "little"):
                return number
        return self.found


def _stride(shape: tuple[int, int, int, int]) -> int:
    """Bytes from one round to the next."""
    classes, channels, height, width = shape
    return classes * channels * height * width + CHECKSUM_BYTES


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

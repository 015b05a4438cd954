"""The spool of whole rounds: uint8 on disk, so that memory does not grow with them.

A record is a round's images, its number and a CRC-32 of both: a file of the right length may still hold a torn record,
after a power cut. Rounds come in the order in which devices finish them.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from submission.errors import OutputError, UsageError
from submission.machine.disk import write_json, write_whole

NUMBER_BYTES, CHECKSUM_BYTES = 4, 4
# Bytes read at a time to check a record, which may be gigabytes long.
PIECE = 1 << 20
# The spool's files in its folder: rounds, and how they are decoded.
RECORDS, DECODER, NETWORK = "rounds.u8", "decoder.json", "decoder.safetensors"


@dataclass(frozen=True)
class Rounds:
    """The first R rounds, from 0 on, indexed as an array [R, classes, 3, size, size].

    Round i begins at byte `offsets[i]` of the file of `descriptor`. Images are read one by one: pages of a mapped file
    would count as this process's memory.
    """

    descriptor: int
    offsets: NDArray[np.int64]
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[np.uint8]:
        """Images uint8 [n, 3, size, size] by their rounds [n] and their classes [n]. Raises OSError."""
        rounds, labels = index
        images = np.empty((len(rounds), *self.shape[1:]), np.uint8)
        image = math.prod(self.shape[1:])
        for target, offset in zip(images, (self.offsets[rounds] + labels * image).tolist(), strict=True):
            if os.preadv(self.descriptor, [target.data], offset) != image:
                raise OSError(0, "the spool is shorter than it was")
        return images

    def first(self, count: int) -> "Rounds":
        """Those with the lowest numbers."""
        return Rounds(self.descriptor, self.offsets[:count], self.shape)


@dataclass(frozen=True)
class Chosen:
    """A choice from a pool, indexed like its rounds: image k of class c is that of round `numbers[k, c]`."""

    pool: Rounds
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: tuple[NDArray[np.int64], NDArray[np.int64]]) -> NDArray[np.uint8]:
        places, labels = index
        return self.pool[self.numbers[places, labels], labels]


def prepare_spool(folder: Path, classes: int, size: int, identity: Mapping[str, str], *, resume: bool) -> int:
    """Makes an empty spool, or with `resume` keeps the rounds of a run before. Returns how many there are or were.

    Raises UsageError where they were made of something else than `identity` says, and OutputError.
    """
    label, records = folder / "identity.json", folder / RECORDS
    try:
        written = records.stat().st_size if records.exists() else 0
        if resume and written:
            _compare(label, identity)
        found = written // _stride((classes, 3, size, size))
        if not resume or not found:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            label.write_text(json.dumps(dict(identity), indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write to {folder.parent} ({error.strerror}): choose another --output") from error
    return found


def is_empty(folder: Path) -> bool:
    """Whether a spool, which may not be there, holds not even a part of a round."""
    records = folder / RECORDS
    return not records.exists() or not records.stat().st_size


def remove_if_empty(folder: Path) -> None:
    """Removes a spool that is (`is_empty`)."""
    if is_empty(folder):
        shutil.rmtree(folder, ignore_errors=True)


class Spool:
    """Rounds, each [classes, 3, size, size] uint8, in any order. `before` is how many a run before has left.

    Image `number` is of class `number % classes` in round `number // classes`.
    """

    def __init__(self, folder: Path, classes: int, size: int) -> None:
        """Opens a prepared spool, with what is whole of it. Raises OutputError."""
        self.folder = folder
        self.shape = (classes, 3, size, size)
        self.count = 0
        self._path = folder / RECORDS
        self._offsets: dict[int, int] = {}
        self._partly: dict[int, tuple[NDArray[np.uint8], NDArray[np.bool_]]] = {}
        stride = _stride(self.shape)
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            self._end = os.fstat(self._descriptor).st_size // stride * stride
            for offset in range(0, self._end, stride):
                if (number := _number(self._descriptor, offset, stride)) is not None:
                    self._offsets.setdefault(number, offset)
        except OSError as error:
            raise OutputError(f"cannot write to {folder.parent} ({error.strerror}): choose another --output") from error
        self.before = len(self._offsets)
        self._advance()

    @property
    def decoder(self) -> Mapping[str, Any] | None:
        """How its rounds were decoded, in the manifest's words, where that is known."""
        try:
            found = json.loads((self.folder / DECODER).read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and {"name", "fitted_to", "fidelity_db"} <= set(found) else None

    @property
    def network(self) -> bytes | None:
        """The network that its rounds were decoded with, where one was fitted."""
        try:
            return (self.folder / NETWORK).read_bytes()
        except OSError:
            return None

    def keep_decoder(self, decoder: Mapping[str, Any], network: bytes | None) -> None:
        """Has a run that is resumed decode as this one does. Raises OutputError."""
        if network:
            write_whole(self.folder / NETWORK, network)
        write_json(self.folder / DECODER, decoder)

    def __contains__(self, number: int) -> bool:
        return number in self._offsets

    def holds(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these images [n] are there, in whole rounds or in others."""
        indices, labels = np.divmod(numbers, self.shape[0])
        there = np.zeros(len(numbers), np.bool_)
        for index in np.unique(indices).tolist():
            of_round = indices == index
            if index in self:
                there[of_round] = True
            elif index in self._partly:
                there[of_round] = self._partly[index][1][labels[of_round]]
        return there

    def add(self, images: NDArray[np.uint8], numbers: NDArray[np.int64]) -> int:
        """Adds images uint8 [n, 3, size, size] by their numbers; a round goes to the disk once it is whole. Returns how
        many of them were missing. Raises OutputError."""
        classes, new = self.shape[0], ~self.holds(numbers)
        images, numbers = images[new], numbers[new]
        for index in np.unique(numbers // classes).tolist():
            of_round = numbers // classes == index
            labels = numbers[of_round] % classes
            empty = np.empty(self.shape, np.uint8), np.zeros(classes, np.bool_)
            content, there = self._partly.setdefault(index, empty)
            content[labels], there[labels] = images[of_round], True
            if there.all():
                self.append(content, index)
                del self._partly[index]
        return len(numbers)

    def append(self, images: NDArray[np.uint8], number: int) -> None:
        """Adds whole round `number`, [classes, 3, size, size]. Raises OutputError."""
        assert images.shape == self.shape and images.dtype == np.uint8
        content, name = np.ascontiguousarray(images).reshape(-1).data, number.to_bytes(NUMBER_BYTES, "little")
        checksum = zlib.crc32(name, zlib.crc32(content)).to_bytes(CHECKSUM_BYTES, "little")
        end = self._end
        try:
            for part in (content, memoryview(name + checksum)):
                while part:  # the system takes two gigabytes at a time, and on a nearly full disk what fits
                    written = os.pwrite(self._descriptor, part, end)
                    part, end = part[written:], end + written  # noqa: PLW2901
        except OSError as error:
            raise OutputError(
                f"cannot write {self._path} ({error.strerror}): every round needs {_stride(self.shape) / 1e6:.1f} MB "
                f"there, and {self.count} of them are done; make room and go on with --resume"
            ) from error
        self._offsets[number], self._end = self._end, end
        self._advance()

    def read(self) -> Rounds:
        """The rounds from 0 on up to the first that is missing, `count` of them."""
        offsets = np.array([self._offsets[number] for number in range(self.count)], np.int64)
        return Rounds(self._descriptor, offsets, self.shape)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the spool. Rounds that were not removed stay for `--resume`."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Removes the spool from the disk: its rounds are in the file."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _advance(self) -> None:
        while self.count in self._offsets:
            self.count += 1


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
        theirs = json.loads(label.read_bytes())
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

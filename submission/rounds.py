"""The spool of finished rounds: uint8 on disk, so that memory does not grow with them."""

import shutil
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from submission.errors import OutputError


class Spool:
    """Rounds appended to one file, each [classes, 3, size, size] uint8, read back through a memory map."""

    def __init__(self, folder: Path, classes: int, size: int) -> None:
        """Starts an empty spool in `folder`, which is made anew. Raises OutputError."""
        self.folder = folder
        self.shape = (classes, 3, size, size)
        self.count = 0
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._file = (folder / "rounds.u8").open("wb", buffering=0)
        except OSError as error:
            raise OutputError(f"cannot write to {folder.parent} ({error.strerror}): choose another --output") from error

    def append(self, images: NDArray[np.uint8]) -> None:
        """Adds one finished round [classes, 3, size, size]. Raises OutputError."""
        assert images.shape == self.shape and images.dtype == np.uint8
        try:
            written = self._file.write(np.ascontiguousarray(images).data)
        except OSError as error:
            raise OutputError(f"cannot write {self._file.name} ({error.strerror}): free some space") from error
        if written != images.nbytes:
            raise OutputError(f"cannot write {self._file.name} (disk full): a round needs {images.nbytes:,} bytes")
        self.count += 1

    def read(self) -> NDArray[np.uint8]:
        """All finished rounds [rounds, classes, 3, size, size], mapped, not loaded."""
        return np.memmap(self._file.name, np.uint8, "r", shape=(self.count, *self.shape))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the spool: once the job is over, its rounds are in the file or will never be."""
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

"""The folder the job writes to: one job at a time, room to write, nothing left of files that were never finished."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from submission.errors import OutputError


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other jobs out of it while the context lasts, or the process. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}): choose another --output") from error
    try:
        try:
            # The lock is the folder's own, so that no file is left of it, and the kernel's, so that it cannot go stale.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another job is writing to {folder}: wait for it, or choose another --output") from error
        yield
    finally:
        os.close(descriptor)


def unfinished(path: Path, writer: int) -> Path:
    """Where a file is written before it is renamed to `path`; `writer` keeps those who write at one time apart."""
    return path.with_name(f".{path.name}.{writer}.unfinished")


def remove_unfinished(folder: Path, name: str) -> int:
    """Removes what killed jobs left of files of task `name`; returns how many there were."""
    leftovers = list(folder.glob(f".{name}.*.unfinished"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def room(folder: Path) -> int:
    """Bytes free to this user there. Raises OutputError."""
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}): choose another --output") from error

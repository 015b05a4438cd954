"""The folder the job writes to: one job at a time, be it of several processes, room to write, nothing left of files
that were never finished."""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from submission.errors import OutputError

# The job's record: locked by its processes, and what the first of them tells the others.
RECORD, RECORD_BYTES = ".job.json", 1024


@contextmanager
def claimed(
    folder: Path, job: str, began: float, prepare: Callable[[], None], clear: Callable[[], None]
) -> Iterator[float | None]:
    """Makes the folder and keeps other jobs out of it while a process of this one is in the context, or alive.

    The first process of a job to come calls `prepare`, while the others wait, and leaves word when it `began` (Unix
    seconds); these are given that time, the first one None. The last to go calls `clear`. Raises OutputError.
    """
    path, descriptor, first = folder / RECORD, None, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while descriptor is None or not is_at(path, descriptor):  # whose last process may just have removed it
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            # The locks are the kernel's, so that none goes stale. All share one; who has it alone is first, or last.
            first = _alone(descriptor)
            if not first:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}): choose another --output") from error
    try:
        if first:
            prepare()
            os.pwrite(descriptor, json.dumps({"job": job, "began": began}).ljust(RECORD_BYTES).encode(), 0)
            # Lets go for a moment, in which another job may become the first of its own.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        record = json.loads(os.pread(descriptor, RECORD_BYTES, 0))
        if record["job"] != job:
            raise OutputError(f"another job is writing to {folder}: wait for it, or choose another --output")
        yield None if first else record["began"]
    finally:
        if is_at(path, descriptor) and _alone(descriptor):
            clear()
            release(folder)
        os.close(descriptor)


def release(folder: Path) -> None:
    """Another job may have the folder from now on."""
    with suppress(OSError):
        (folder / RECORD).unlink()


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the path leads to the file that is open there."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _alone(descriptor: int) -> bool:
    """Takes the lock for this process alone, if it can be had."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unfinished(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`: another name each time, since several may write it.

    Whoever finds it removed by then has been replaced, and what it wrote is not to appear.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")


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

"""The folder a job writes to: one job at a time, room to write, files that are there whole or not at all."""

import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from submission.errors import OutputError, cannot_write

# Locked by the job that has the folder.
LOCK = ".job.lock"
# What file systems say that know no locks, as those of clusters may.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# The Dockerfile sets this variable of the environment.
CONTAINER = "BANKO_CONTAINER"
# What is mounted where, as this process sees it (proc(5)).
MOUNTS = Path("/proc/self/mountinfo")
# What a process finds its open files as, beside their numbers.
OPEN_FILES = {"/dev/stdout": 1, "/dev/stderr": 2}


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Makes the folder and keeps other jobs out while the context lasts, or until `release`.

    False where its file system has no locks. Raises OutputError.
    """
    path, descriptor, locked = folder / LOCK, None, True
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"{str(folder)!r} is not UTF-8, and not for libraries to read: choose another") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while descriptor is None or not _is_at(path, descriptor):  # which another job may just have removed
            if descriptor is not None:
                os.close(descriptor)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            # The lock is the kernel's, so that none goes stale.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"another job is writing to {folder}: wait for it, or choose another --output") from error
    except OSError as error:
        if descriptor is None or error.errno not in NO_LOCKS:
            raise OutputError(f"cannot write to {folder} ({error.strerror}){_advice(error)}") from error
        locked = False
    try:
        yield locked
    finally:
        if _is_at(path, descriptor):
            release(folder)
        os.close(descriptor)


def _advice(error: OSError) -> str:
    """What to do where a folder cannot be written to."""
    if CONTAINER not in os.environ or error.errno != errno.EACCES:
        return ": choose another --output"
    user = os.getuid()
    return (
        f' as user {user}: run the image with --user "$(id -u):$(id -g)", or give that user the folder that is mounted '
        f"there (chown {user})"
    )


def read_bytes(file: Path, most: int) -> bytes:
    """All of a file that is to have `most` bytes at most. Raises OSError, and ValueError where it has more."""
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    return content


def goes_with_the_container(folder: Path) -> bool:
    """Whether what is written there is lost with the container that this process runs in, since nothing is mounted."""
    if CONTAINER not in os.environ:
        return False
    points = [line.split()[4] for line in MOUNTS.read_text(errors="surrogateescape").splitlines()]
    # Spaces and the like stand there as octal escapes.
    mounted = {re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point) for point in points}
    place = folder.resolve()
    return not any(str(above) in mounted for above in (place, *place.parents[:-1]))


def offer_temporary(folder: Path) -> None:
    """Has libraries put their temporary files there where no place is left: a container's root may be read-only."""
    try:
        there = Path(tempfile.gettempdir()).is_dir()  # which may have been another task's such folder
    except FileNotFoundError:
        there = False
    if not there:
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder.absolute())


def release(folder: Path) -> None:
    """Another job may have the folder from now on."""
    with suppress(OSError):
        (folder / LOCK).unlink()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the path leads to the file that is open there."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def unfinished(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`: another name each time, since a snapshot that was given
    up may still be at it while the last file is written."""
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


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes `content` to `path` as `write_whole` does."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def _descriptor(path: Path) -> int | None:
    """That of the open file that a path stands for, if it does."""
    number = re.fullmatch(r"/dev/fd/([0-9]+)", str(path))
    return int(number[1]) if number else OPEN_FILES.get(str(path))


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes `path` whole or not at all; into it, where it is a device or stands for an open file (`/dev/stdout`).
    Raises OutputError."""
    scratch, descriptor = unfinished(path), _descriptor(path)
    try:
        if descriptor is not None:
            sys.stdout.flush()
            with os.fdopen(os.dup(descriptor), "wb") as stream:  # which is opened anew by no name: it has a position
                stream.write(content)
            return
        if path.is_char_device():
            path.write_bytes(content)
            return
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise cannot_write(path, error, memoryview(content).nbytes) from error
    finally:
        with suppress(OSError):
            scratch.unlink()

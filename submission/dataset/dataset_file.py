"""The challenge's `.pt` file: written from the spool class by class, copies made on the way, checked, put in place.

The file is what `torch.save` would write for one float tensor [classes * IPC, 3, H, W], so `torch.load` reads it
with `weights_only=True` and can map it. It is streamed, so that memory does not grow with it.
"""

import errno
import math
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from submission.dataset.augment import PdaStyle, augment
from submission.dataset.rounds import Chosen, Rounds
from submission.errors import OutputError, cannot_write
from submission.machine.crowding import seconds_idle
from submission.machine.disk import unfinished
from submission.tasks import Task

# Pixels held as floats at a time while writing or verifying: 12 MB, whatever the size of the file.
PIXELS_PER_CHUNK = 1 << 20
# Chunks made at the same time at most: each takes some 50 MB on the way, and one disk takes no more.
MOST_WORKERS = 8
# The part of the time that goes into reading the file back: progress is told in one fraction for both.
VERIFYING = 0.25
# Slack for float16's rounding of normalised pixels, which are below 4; of larger ones it is in proportion.
ROUNDING = 0.01
# A whole file with less standard deviation in a channel, or a mean closer to black or white, holds no photographs.
LEAST_SPREAD = 0.02


@dataclass(frozen=True)
class FileSpec:
    """What decides the bytes of the file, beside the rounds: task, IPC, augmentation, its seed, the file's dtype."""

    task: Task
    ipc: int
    pda: PdaStyle
    seed: int
    dtype: torch.dtype


class AbandonedError(Exception):
    """Raised by a caller's `check` to give up a file that is being written."""


def write_dataset(
    path: Path,
    rounds: NDArray[np.uint8] | Rounds | Chosen,
    spec: FileSpec,
    check: Callable[[float], None] = lambda _: None,
    *,
    placing: AbstractContextManager[object] | None = None,
    all_cores: bool = True,
) -> float:
    """Writes `path` from `rounds` [R, classes, 3, H, W] and puts it in place whole, checked, or not at all.

    Class by class: the R generated images in round order, then copies, the first copy of every image before the second
    of any: at place j of a class stands image `j % R`, copy `j // R` (0 is the image itself). `check` is told often
    what fraction is done, and may raise AbandonedError to give up. `placing` is held while the file is put in place.
    With `all_cores` they are all used, without it only the calling thread. Returns the seconds spent waiting for the
    disk. Raises OutputError.
    """
    task = spec.task
    scratch = unfinished(path)
    shape = (len(task.classes) * spec.ipc, 3, task.size, task.size)
    step = _chunk_size(task)
    starts = range(0, shape[0], step)
    # The file's images in order, as functions that make one chunk each.
    chunks = (partial(_chunk, rounds, spec, np.arange(start, min(start + step, shape[0]))) for start in starts)
    share = (1 - VERIFYING) / len(starts)
    # Chunks are made side by side, each on one thread: operations on so few pixels are not worth sharing out, and
    # where other processes compete for the cores, waiting for a share costs a hundred times the work itself.
    workers = min(MOST_WORKERS, torch.get_num_threads())
    waited = 0.0
    try:
        skeleton = _skeleton(scratch, shape, spec.dtype)
        with (
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
            zipfile.ZipFile(scratch, "w") as archive,
        ):
            for name, content in skeleton.items():
                if content is not None:
                    archive.writestr(name, content)
                    continue
                made = _in_order(pool, workers, chunks) if all_cores else (make() for make in chunks)
                with archive.open(_aligned(name, archive), "w", force_zip64=True) as stream:
                    for number, images in enumerate(made):
                        idle = seconds_idle()
                        stream.write(images.numpy().reshape(-1).view(np.uint8).data)
                        waited += seconds_idle() - idle
                        check(share * (number + 1))
            archive.close()
            idle = seconds_idle()
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            waited += seconds_idle() - idle
            if all_cores:
                pool.submit(verify, scratch, spec, check).result()
            else:
                verify(scratch, spec, check)
        with placing or nullcontext():
            check(1.0)  # here, for a better file may have come into place while this one waited
            scratch.replace(path)
        return waited
    except OSError as error:
        raise cannot_write(path, error, math.prod(shape) * spec.dtype.itemsize) from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def verify(path: Path, spec: FileSpec, check: Callable[[float], None] = lambda _: None) -> None:
    """Reads a file back whole and checks shape, dtype, checksum, and that values are those of normalised pixels.

    It is read as a stream, since the pages of a mapped file would count as this process's memory. Raises OutputError.
    """
    task = spec.task
    shape = (len(task.classes) * spec.ipc, 3, task.size, task.size)
    mean, std = (figure.flatten() for figure in mean_and_std(task))
    low, high = (0 - mean) / std, (1 - mean) / std
    slack = ROUNDING * torch.maximum(-low, high).div(4).clamp(min=1)
    low, high = low - slack, high + slack
    sums, squares = torch.zeros(3, dtype=torch.double), torch.zeros(3, dtype=torch.double)
    done = 0
    try:
        images = torch.load(path, mmap=True, weights_only=True)
        if images.shape != shape or images.dtype != spec.dtype or not images.is_contiguous():
            raise OutputError(f"{path} reads back as {images.dtype} {list(images.shape)}, not {list(shape)}")
        with zipfile.ZipFile(path) as archive, archive.open(_data_record(archive)) as stream:
            while chunk := bytearray(stream.read(_chunk_size(task) * images[0].nbytes)):
                values = torch.frombuffer(chunk, dtype=spec.dtype).view(-1, 3, task.size**2).float()
                # One comparison catches NaN, infinity, and pixels outside 0..1.
                least, most = torch.aminmax(values, dim=2)
                if not ((least >= low) & (most <= high)).all():
                    raise OutputError(f"{path} reads back with values that are no normalised pixels")
                # Over one image in float32, which is many times as fast, and over the images in double.
                sums += values.sum(2).sum(0, dtype=torch.double)
                squares += torch.linalg.vector_norm(values, dim=2).double().square().sum(0)
                done += len(values)
                check(1 - VERIFYING * (1 - done / shape[0]))
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise OutputError(f"{path} does not read back ({error})") from error
    count = images[:, 0].numel()
    means = (sums / count).float() * std + mean
    spreads = (squares / count - (sums / count) ** 2).clamp(min=0).sqrt().float() * std
    # One or two channels may have next to nothing to tell, as of images under a microscope.
    if spreads.max() < LEAST_SPREAD or means.max() < LEAST_SPREAD or means.min() > 1 - LEAST_SPREAD:
        raise OutputError(
            f"{path} reads back almost black, white or grey: mean {means.tolist()}, std {spreads.tolist()}"
        )


def mean_and_std(task: Task) -> tuple[Tensor, Tensor]:
    """Of the task's pixels in 0..1, float32 [3, 1, 1] each: `(pixels - mean) / std` are the numbers in a file."""
    return torch.tensor(task.mean).view(3, 1, 1), torch.tensor(task.std).view(3, 1, 1)


def _chunk(rounds: NDArray[np.uint8] | Rounds | Chosen, spec: FileSpec, positions: NDArray[np.int64]) -> Tensor:
    """The images at those positions [n] of the file, normalised [n, 3, H, W]."""
    mean, std = mean_and_std(spec.task)
    labels, within = np.divmod(positions, spec.ipc)
    copies, sources = np.divmod(within, len(rounds))
    images = torch.from_numpy(rounds[sources, labels])
    pixels = images.float() / 255
    copied = copies > 0
    keys = np.stack([labels, sources, copies], axis=1)[copied]
    pixels[copied] = augment(images[copied], keys, spec.seed, spec.pda)
    return ((pixels - mean) / std).to(spec.dtype)


def _in_order(pool: Executor, ahead: int, makers: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """Results of `makers` in their order, no more than `ahead` of them waiting to be taken."""
    running: deque[Future[Tensor]] = deque()
    for maker in makers:
        running.append(pool.submit(maker))
        if len(running) > ahead:
            yield running.popleft().result()
    for future in running:
        yield future.result()


def _chunk_size(task: Task) -> int:
    return max(1, PIXELS_PER_CHUNK // task.size**2)


def _skeleton(scratch: Path, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, bytes | None]:
    """The records of torch's archive around a tensor, by name, in order; None stands for the tensor's own bytes.

    torch writes them itself; `skip_data` leaves a hole for the tensor. A fake one has no memory: a real one larger than
    the machine's would not be had, though never touched.
    """
    try:
        with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
            torch.save(torch.empty(shape, dtype=dtype), scratch)
    except RuntimeError as error:  # torch's own for whatever the file system says
        raise OSError(errno.EFBIG, "no file of this size can be made there") from error
    with zipfile.ZipFile(scratch) as archive:
        data = _data_record(archive)
        return {name: None if name == data else archive.read(name) for name in archive.namelist()}


def _data_record(archive: zipfile.ZipFile) -> str:
    """The name of the record with the tensor's bytes in one of torch's archives: FOLDER/data/0."""
    return next(name for name in archive.namelist() if name.endswith("/data/0"))


def _aligned(name: str, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """A record whose bytes will start at a multiple of 64, as torch places them, so that they can be mapped."""
    record = zipfile.ZipInfo(name)
    assert archive.fp is not None
    # Local header: 30 bytes, the name, zipfile's own 20-byte zip64 field, then this padding field with a 4-byte head.
    unpadded = archive.fp.tell() + 30 + len(name.encode()) + 20 + 4
    padding = -unpadded % 64
    record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return record

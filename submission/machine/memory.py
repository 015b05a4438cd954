"""Memory: what is free, what this process takes, and whether batches may grow within what was said beforehand."""

import ctypes
import re
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from submission.machine.limits import memory_left

# Bytes for what goes on beside the model and is done with again: a batch, or the encoding of prompts.
WORKING = 1500 << 20
# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes of memory at the end of loading: the most that it took, and what of that was left."""

    loading: int
    before: int

    @classmethod
    def watch(cls) -> Self:
        loading = peak_memory()
        forget_peak()
        return cls(loading, psutil.Process().memory_info().rss)

    @property
    def peak(self) -> int:
        """The most that the process has taken."""
        return max(self.loading, peak_memory())

    def allows_more(self) -> bool:
        """Whether twice of what batches have taken so far would still be within `WORKING`."""
        return 2 * (peak_memory() - self.before) <= WORKING


def forget_peak() -> None:
    """Have the kernel count the peak anew (proc(5), clear_refs). Where it does not, the peak so far stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def return_freed() -> None:
    """Have the C library, where it is glibc, return to the system what has been freed: else it stays in this process
    beside whatever comes next."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def keep_freed_memory() -> None:
    """Have the process keep memory that it frees, where the C library is glibc; for the rest of its life.

    glibc otherwise maps every large activation anew, and the kernel zeroes its pages, in every step: four tenths of
    the time of a step on a CPU. Results stay the same to the bit; the process takes up to half as much memory again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def peak_memory() -> int:
    """Bytes, the most that were resident at once (proc(5), VmHWM).

    Where the kernel does not count that, `getrusage` does, too high: its peak is at least that of the process which
    started this one, and stays.
    """
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_free() -> int:
    """Bytes that this process may still take: what the machine has left, or a container's limit if that is less."""
    available, left = int(psutil.virtual_memory().available), memory_left()
    return available if left is None else min(available, left)

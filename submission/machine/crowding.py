"""How much other processes are in the way, from what the kernel says of threads that were kept waiting for a core."""

import os
import time
from pathlib import Path

# What earlier batches count for beside the newest one.
MEMORY = 0.9
# Seconds of running that the measure needs before it is believed.
LEAST_RUN = 0.05


class Crowding:
    """How many times as long as alone the main thread takes at present."""

    def __init__(self) -> None:
        self._main = f"self/task/{os.getpid()}"
        self._before = ran_and_waited(self._main)
        self._ran = self._waited = 0.0

    def look(self, *, count: bool) -> float:
        """The factor, 1 or more. What happened since the last look is left out where it is not to `count`."""
        now = ran_and_waited(self._main)
        if count:
            self._ran = MEMORY * self._ran + now[0] - self._before[0]
            self._waited = MEMORY * self._waited + now[1] - self._before[1]
        self._before = now
        return 1 + self._waited / self._ran if self._ran > LEAST_RUN else 1.0


def seconds_idle() -> float:
    """A clock that runs while the calling thread neither has a core nor wants one: it sleeps, or waits for a disk."""
    return time.perf_counter() - time.thread_time() - ran_and_waited("thread-self")[1]


def ran_and_waited(thread: str) -> tuple[float, float]:
    """Seconds a thread, by its folder in /proc, has run, and those it was ready to run while others had the cores.

    Zeros where the system does not say.
    """
    try:
        ran, waited, _ = Path(f"/proc/{thread}/schedstat").read_text().split()
        return int(ran) / 1e9, int(waited) / 1e9
    except (OSError, ValueError):
        return 0.0, 0.0

"""Snapshots: whole files written beside generation, on a thread that yields to it."""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from submission.dataset_file import AbandonedError, Recipe, write_dataset
from submission.estimates import Extent
from submission.rounds import Rounds

# How far the writing thread stands back: at 5 it gets a quarter of a core that generation wants, too.
NICENESS = 5
# Seconds a thread has to have run before its waiting is believed.
LEAST_RUN = 0.02
# Seconds that giving up a snapshot may take, where the disk does not answer.
ABANDON_PATIENCE = 1.0


@dataclass(frozen=True)
class Snapshot:
    """A file put in place: `seconds` it would have taken instead of generation, `spent` of a core's time."""

    extent: Extent
    seconds: float
    spent: float


class SnapshotWriter:
    """Writes one file at a time on a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._done: Snapshot | None = None
        self._error: Exception | None = None
        self._abandoned = False

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, path: Path, rounds: Rounds, recipe: Recipe, extent: Extent, then: Callable[[Extent], None]) -> None:
        """Begins to write; `then` is called on the same thread once the file is in place."""

        def check(_: float) -> None:
            if self._abandoned:
                raise AbandonedError

        def work() -> None:
            if sys.platform == "linux":
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
            torch.set_num_threads(1)  # of this thread alone
            began, busy, waited = time.perf_counter(), time.thread_time(), _ran_and_waited("thread-self")[1]
            main = _ran_and_waited(f"self/task/{os.getpid()}")
            try:
                write_dataset(path, rounds, recipe, check, alone=False)
                took = time.perf_counter() - began - (_ran_and_waited("thread-self")[1] - waited)
                took *= _crowding(main, _ran_and_waited(f"self/task/{os.getpid()}"))
                self._done = Snapshot(extent, took, time.thread_time() - busy)
                then(extent)
            except AbandonedError:
                pass
            except Exception as error:  # noqa: BLE001  raised again where the snapshot is collected
                self._error = error

        self._done = None
        self._thread = threading.Thread(target=work, name="snapshot", daemon=True)
        self._thread.start()

    def collect(self) -> Snapshot | None:
        """The snapshot that was finished since this was last asked, if any. Raises what stopped it: OutputError."""
        if self.busy:
            return None
        done, self._done = self._done, None
        error, self._error = self._error, None
        if error:
            raise error
        return done

    def abandon(self) -> None:
        """Gives up a snapshot in the making. None can be put in place afterwards."""
        self._abandoned = True
        if self._thread:
            self._thread.join(ABANDON_PATIENCE)


def _ran_and_waited(thread: str) -> tuple[float, float]:
    """Seconds a thread, by its folder in /proc, has run, and those it was ready to run while others had the cores.

    Zeros where the system does not say.
    """
    try:
        ran, waited, _ = Path(f"/proc/{thread}/schedstat").read_text().split()
        return int(ran) / 1e9, int(waited) / 1e9
    except (OSError, ValueError):
        return 0.0, 0.0


def _crowding(before: tuple[float, float], after: tuple[float, float]) -> float:
    """How many times as long as alone the main thread took in between, with others about: the last file will, too."""
    ran, waited = after[0] - before[0], after[1] - before[1]
    return 1 + waited / ran if ran > LEAST_RUN else 1.0

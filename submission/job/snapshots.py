"""Snapshots: whole files written beside generation, on a thread that yields to it."""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from submission.dataset.dataset_file import AbandonedError, FileSpec, write_dataset
from submission.dataset.rounds import Rounds
from submission.plan.estimates import Extent

# How far the writing thread stands back: at 5 it gets a quarter of a core that generation wants, too.
NICENESS = 5
# Seconds that giving up a snapshot may take, where the disk does not answer.
ABANDON_PATIENCE = 1.0


@dataclass(frozen=True)
class Snapshot:
    """A file put in place: `seconds` it would have taken with a core to itself, `spent` of a core's time."""

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

    def start(
        self,
        path: Path,
        rounds: Rounds,
        spec: FileSpec,
        extent: Extent,
        placing: AbstractContextManager[object],
        then: Callable[[], None],
    ) -> None:
        """Begins to write; `placing` is held while the file comes into place, then `then` is called on that thread."""

        def check(_: float) -> None:
            if self._abandoned:
                raise AbandonedError

        def work() -> None:
            if sys.platform == "linux":
                # A job that was started with `nice` may stand back further: it may not, nor need it, come forward.
                niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0))
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
            torch.set_num_threads(1)  # of this thread alone
            busy = time.thread_time()
            try:
                waited = write_dataset(path, rounds, spec, check, placing=placing, all_cores=False)
                spent = time.thread_time() - busy
                # Without what it waited for cores and for Python's own lock, which the last file need not share.
                self._done = Snapshot(extent, spent + waited, spent)
                then()
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
        """Gives up a snapshot in the making: none begins to come into place afterwards."""
        self._abandoned = True
        if self._thread:
            self._thread.join(ABANDON_PATIENCE)

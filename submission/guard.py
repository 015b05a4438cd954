"""The guard: a thread that sees to it that the job ends in time, whatever the main thread is doing.

Python runs signal handlers on the main thread, between two of its instructions, and a call into a device may keep it
from there for a minute. So signals wake this thread instead, and it watches the clock.
"""

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from submission.budget import Budget
from submission.errors import BudgetError

# Seconds between two looks at the clock.
TICK = 0.05
# Seconds the main thread has, once told to stop, to begin with the last file.
PATIENCE = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Duties:
    """What the guard does for a job. Each returns at once but `finish`, which runs on a thread of its own.

    `hurry` is called once, on the first signal. `overdue`: whether the last file should have been begun by now. `late`:
    whether the time is over. `finish` writes the last file, `last_words` says what is on disk; both return an exit
    code.
    """

    hurry: Callable[[signal.Signals], None]
    overdue: Callable[[], bool]
    late: Callable[[], bool]
    finish: Callable[[], int]
    last_words: Callable[[], int]


class Guard:
    """A context in which SIGTERM and SIGINT set `stop`, a second one ends the process, and so does the deadline.

    Whoever acquires `finishing` writes the last file: the main thread as a rule, and the guard in its stead where it
    does not come in time.
    """

    def __init__(self, budget: Budget) -> None:
        self.stop = threading.Event()
        self.finishing = threading.Lock()
        self.duties: Duties | None = None
        self._budget = budget
        self._stopped_by: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._wake, wake = socket.socketpair()
        wake.setblocking(False)
        self._wake_end = wake
        # The handlers themselves do nothing: what counts is the byte that Python writes for each signal.
        self._handlers = [signal.signal(number, lambda *_: None) for number in SIGNALS]
        self._wakeup = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in zip(SIGNALS, self._handlers, strict=True):
            signal.signal(number, handler)
        self._wake_end.close()  # ends the thread
        self._thread.join()
        self._wake.close()

    def _watch(self) -> None:
        told_at = 0.0
        while True:
            if select.select([self._wake], [], [], TICK)[0]:
                numbers = self._wake.recv(64)
                if not numbers:
                    return
                for number in numbers:
                    if number not in SIGNALS:
                        continue
                    if self._stopped_by:
                        leave(128 + number)
                    self._stopped_by, told_at = signal.Signals(number), self._budget.elapsed
                    self.stop.set()
                    if self.duties:
                        self.duties.hurry(self._stopped_by)
            duties = self.duties
            if duties is None:
                if self._budget.left <= self._budget.last:
                    seconds = f"a budget of {self._budget.seconds:g} s"
                    print(f"error: {seconds} is over before the model is loaded: give a longer one", file=sys.stderr)
                    leave(BudgetError.exit_code)
                if self._stopped_by and self._budget.elapsed - told_at > PATIENCE:
                    print("error: stopped before the first round was done: nothing is written", file=sys.stderr)
                    leave(BudgetError.exit_code)
                continue
            if duties.late():
                leave(duties.last_words())
            ignored = self._stopped_by is not None and self._budget.elapsed - told_at > PATIENCE
            if (ignored or duties.overdue()) and self.finishing.acquire(blocking=False):
                threading.Thread(target=_finish, args=(duties,), name="finish", daemon=True).start()


def _finish(duties: Duties) -> None:
    leave(duties.finish())


def leave(code: int) -> None:
    """Ends the process at once: taking torch and its libraries apart in order takes seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

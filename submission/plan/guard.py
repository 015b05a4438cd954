"""The guard: a thread that sees to it that the job ends in time, whatever the main thread is doing.

Python runs signal handlers on the main thread, between two of its instructions, and a call into a device may keep it
from there for a minute. So signals wake this thread instead, and it watches the clock.
"""

import math
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol, Self

from submission.errors import BankoError, BudgetError, CheckpointError
from submission.plan.budget import Budget

# Seconds between two looks at the clock.
TICK = 0.05
# Seconds the main thread has, once told to stop, to begin with the last file.
PATIENCE = 1.0
# Seconds for the last words, which nobody may be listening to.
LAST_WORDS_PATIENCE = 0.15
# Those that tell a job to stop. Clusters send SIGUSR1 or SIGUSR2 where they are asked to (Slurm: --signal) and SIGXCPU
# near a limit, a terminal that is lost SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)

# Why the deadline comes, where a checkpoint is still being fetched.
HUB_IS_LATE = CheckpointError("the checkpoint's files do not come from the hub in time: try again, what came is kept")


class Duties(Protocol):
    """What the guard does for a job.

    `overdue` and `exit_code` answer at once: whether the last file should have been begun by now, and with what code
    the job would end now. The others may wait for a disk or for whoever reads what is printed, and run on threads of
    their own: `stopped_by` is called once, on the first signal; `take_over` writes the last file and returns the exit
    code; `last_words` says that time is up.
    """

    def overdue(self) -> bool: ...

    def exit_code(self) -> int: ...

    def stopped_by(self, number: signal.Signals) -> None: ...

    def take_over(self) -> int: ...

    def last_words(self) -> None: ...


class Leaving(Protocol):
    """What else is to be done where the guard ends the process, and the job at hand with that exit code.

    `exit_code` answers at once, with that of the process. `last_lines` closes the log: a live display would leave the
    terminal as it is.
    """

    def exit_code(self, code: int) -> int: ...

    def last_lines(self, code: int) -> None: ...


@contextmanager
def hearing() -> Iterator[threading.Event]:
    """A context in which signals (`SIGNALS`) end nothing by themselves: each sets the event. What else comes of them is
    up to the guard of the job that they reach; between two jobs there is none, and whoever begins jobs asks the event.
    """
    told = threading.Event()
    # Under nohup SIGHUP is ignored, and stays so.
    heard = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: told.set()) for number in heard}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Guard:
    """A context, inside `hearing`, in which a signal sets `stop`, a second one ends the process, and so does the `end`.

    Whoever acquires `last_file_lock` writes the last file: the main thread as a rule, and the guard in its stead where
    it does not come in time for the deadline of the `budget`. The guard then ends the process; but if other jobs are
    to follow, it waits until the `end` for the main thread to come back.
    """

    def __init__(self, budget: Budget, end: Budget, leaving: Leaving) -> None:
        """`end` is the budget of all jobs from this one on, the same object as `budget` for the last one."""
        self.stop = threading.Event()
        self.last_file_lock = threading.Lock()
        self._duties: Duties | None = None
        self._before_exit: Callable[[], None] = lambda: None
        self._budget, self._end, self._leaving = budget, end, leaving
        self._stopped_by: signal.Signals | None = None
        self._awaited: BankoError | None = None
        self._took_over = False

    def serve(self, duties: Duties) -> None:
        """From now on the job has something to end."""
        self._duties = duties

    def before_exit(self, work: Callable[[], None]) -> None:
        """Has `work` done, which has to be quick, where the guard ends the process."""
        self._before_exit = work

    def __enter__(self) -> Self:
        self._wake, wake = socket.socketpair()
        wake.setblocking(False)
        self._wake_end = wake
        # What counts here is the byte that Python writes for each signal.
        self._wakeup = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        self._wake_end.close()  # ends the thread
        self._thread.join()
        self._wake.close()

    @contextmanager
    def awaiting(self, error: BankoError) -> Iterator[None]:
        """While the context lasts, the deadline is missed for this reason."""
        self._awaited = error
        yield
        self._awaited = None

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
                        self._exit(128 + number)
                    self._stopped_by, told_at = signal.Signals(number), self._budget.elapsed
                    self._budget.hurry()
                    self._end.hurry()
                    self.stop.set()
                    if self._duties:
                        _start(self._duties.stopped_by, self._stopped_by)
            duties = self._duties
            if duties is None:
                if self._end.late():
                    seconds = self._budget.seconds
                    longer = math.ceil(2 * max(seconds, self._budget.elapsed))
                    over = BudgetError(
                        f"a budget of {round(seconds, 2):g} s is over before the model is loaded: give a longer one, "
                        f"such as --budget {longer}s"
                    )
                    print(f"error: {self._awaited or over}", file=sys.stderr)
                    self._exit((self._awaited or over).exit_code)
                if self._stopped_by and self._budget.elapsed - told_at > PATIENCE:
                    print("error: stopped before the first round was done: nothing is written", file=sys.stderr)
                    self._exit(BudgetError.exit_code)
                continue
            if self._end.late():
                _start(duties.last_words).join(LAST_WORDS_PATIENCE)
                self._exit(duties.exit_code())
            ignored = self._stopped_by is not None and self._budget.elapsed - told_at > PATIENCE
            if self._took_over:
                if ignored:
                    self._exit(duties.exit_code())
            elif (ignored or duties.overdue()) and self.last_file_lock.acquire(blocking=False):
                _start(self._take_over, duties)

    def _take_over(self, duties: Duties) -> None:
        code = duties.take_over()
        if code or self._stopped_by or self._end is self._budget:
            # At once: taking torch and its libraries apart in order takes seconds.
            self._exit(code)
        self._took_over = True
        self.last_file_lock.release()

    def _exit(self, code: int) -> NoReturn:
        self._before_exit()
        _start(self._leaving.last_lines, code).join(LAST_WORDS_PATIENCE)
        os._exit(self._leaving.exit_code(code))


def _start(work: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread

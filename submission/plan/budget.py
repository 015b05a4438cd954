"""The clock that a job runs against: its budget, its deadline, and the grace that is left after a signal."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Before the deadline, by so many seconds and so much of the budget, the process has to go, whatever it is doing: one
# with much memory or a GPU takes its time.
EXIT_SECONDS, EXIT_SHARE = 0.4, 0.0015
# Seconds in which a job that was told to stop is gone: containers are given ten.
GRACE_SECONDS = 6.5
# Of shared time a task has so many seconds at least, however few its classes are: to start takes about ten.
LEAST_SHARE = 15.0


@dataclass
class Budget:
    """A span of time with a deadline, on a clock that never jumps.

    `seconds` reach from start to deadline; `start` is a reading of `clock`, which counts seconds monotonically. All
    moments in a job are counted from there. A job that was told to stop has until `grace_end`, or until the
    deadline if that is earlier.
    """

    seconds: float
    start: float
    clock: Callable[[], float] = time.monotonic
    grace_end: float = math.inf

    @property
    def elapsed(self) -> float:
        return self.clock() - self.start

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.seconds - self.elapsed

    @property
    def usable(self) -> float:
        """Seconds to the deadline or to the end of the grace, whichever comes first."""
        return min(self.seconds, self.grace_end) - self.elapsed

    @property
    def hurried(self) -> bool:
        """Whether the job was told to stop."""
        return math.isfinite(self.grace_end)

    @property
    def exit_reserve(self) -> float:
        """Seconds kept for the end of the process."""
        return EXIT_SECONDS if self.hurried else EXIT_SECONDS + EXIT_SHARE * self.seconds

    def hurry(self) -> None:
        """The job is told to stop; the first time counts."""
        self.grace_end = min(self.grace_end, self.elapsed + GRACE_SECONDS)

    def late(self) -> bool:
        """Whether the process has to go now."""
        return self.usable <= self.exit_reserve


@dataclass(frozen=True)
class Allowance:
    """The time of tasks that are done one after the other from `start` on, a reading of the monotonic clock: so many
    `seconds` for each or, where they are `shared`, for all."""

    seconds: float
    start: float
    shared: bool = False

    def turn(self, classes: Sequence[int], began: float) -> tuple[Budget, Budget]:
        """The budget of the first of the tasks to come, whose turn `began` then, and that of all of them, the same
        object for the last one. They have so many `classes`.

        Shared time is split by these: an image of each task costs the same, on a canvas that is the checkpoint's. But
        every task has `LEAST_SHARE` seconds, or as many as the others. What a task has left is part of what is split at
        the next turn.
        """
        if self.shared:
            left = self.start + self.seconds - began
            least = min(LEAST_SHARE, left / len(classes))
            to_split, of = left, sum(classes)
            for few in sorted(classes)[:-1]:
                if to_split * few >= least * of:
                    break
                to_split, of = to_split - least, of - few
            budget, end = Budget(max(least, to_split * classes[0] / of), began), Budget(left, began)
        else:
            budget, end = Budget(self.seconds, began), Budget(self.seconds * len(classes), began)
        return budget, end if len(classes) > 1 else budget


def start_budget(seconds: float, *epochs: float | None) -> Budget:
    """The budget that began at the earliest of `epochs` (Unix seconds; None and the future are passed over).

    The wall clock is read once, here; from now on only the monotonic clock counts.
    """
    now = time.time()
    return Budget(seconds, time.monotonic() - (now - min([now, *(e for e in epochs if e is not None)])))

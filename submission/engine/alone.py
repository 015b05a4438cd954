"""One device, in the job's own process: what it is asked for it makes at once."""

import socket
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from submission.engine import Event, Failed, Load, Made, NoMemoryError, Placement, Ready
from submission.log import Log


class Alone:
    """An engine (`submission.engine.Engine`) of one device."""

    alone = True
    count = depth = 1
    seconds_to_close = 0.0

    def __init__(self, kind: str, log: Log) -> None:
        self.placement = Placement(kind)
        self._log = log
        self._events: list[Event] = []
        self._asked: tuple[NDArray[np.int64], bool, bool] | None = None

    def load(self, load: Load, seconds_left: Callable[[], float]) -> None:
        began = time.perf_counter()
        self._maker = load(seconds_left(), None, None, self._log)
        seconds = time.perf_counter() - began
        ready = Ready(0, self.placement.kind, socket.gethostname(), self._maker.facts(), seconds, self._maker.network)
        self._events = [ready]

    def ask(self, device: int, numbers: NDArray[np.int64], *, disturbed: bool, compiled: bool) -> None:
        self._asked = numbers, disturbed, compiled

    def events(self, seconds: float) -> Sequence[Event]:
        events, self._events = self._events, []
        if self._asked:
            (numbers, disturbed, compiled), self._asked = self._asked, None
            try:
                made = self._maker.make(numbers, disturbed=disturbed, compiled=compiled)
                events.append(Made(0, *made, self._maker.facts()))
            except (RuntimeError, NoMemoryError) as error:
                events.append(Failed(0, error))
        return events

    def restart(self, device: int) -> bool:
        return False

    def stop(self, device: int) -> None:
        """A device in this process cannot be ended before it comes back."""

    def close(self, patience: float = 1.0) -> None:
        """There is nothing to end."""

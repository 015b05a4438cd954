"""Where images come from: one device in this process (`alone`), or many through Ray (`fleet`), behind one interface.

The generating loop asks devices for image numbers and gets events back. Imports neither torch nor Ray.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from submission.devices import Facts
from submission.progress import Log


@dataclass(frozen=True)
class Ready:
    """A device has its generator loaded, which took so many seconds; what it `said` on the way (`Log.kept`)."""

    device: int
    name: str
    node: str
    facts: Facts
    seconds: float
    said: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Made:
    """A device comes back with the first batch that it has in hand: uint8 [n, 3, size, size], after so many `seconds`.

    `grows`: whether its memory allows larger batches. `crowding`: how many times as long as alone its process takes at
    present, None where that is another machine's affair.
    """

    device: int
    images: NDArray[np.uint8]
    seconds: float
    grows: bool
    crowding: float | None
    facts: Facts
    said: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Failed:
    """A device cannot load its generator, or comes back from its first batch without images."""

    device: int
    error: Exception


@dataclass(frozen=True)
class Gone:
    """A device has died, with all that it had in hand."""

    device: int
    reason: str


Event = Ready | Made | Failed | Gone


class NoMemoryError(Exception):
    """A batch does not fit into a device's memory."""


class Maker(Protocol):
    """A device with its generator, in whatever process that is."""

    def facts(self) -> Facts: ...

    def make(self, numbers: NDArray[np.int64], *, disturbed: bool) -> tuple[NDArray[np.uint8], float, bool, float]:
        """The images of those numbers [n], seconds, whether memory allows larger batches, and crowding.

        Raises NoMemoryError, CheckpointError, and RuntimeError where the device fails.
        """
        ...


# Loads a generator inside so many seconds of the budget, in the manner of another device (`Facts.manner`) or, with
# None, in its own. Raises UsageError and CheckpointError.
Load = Callable[[float, tuple[object, ...] | None, Log], Maker]


class Engine(Protocol):
    """Devices, numbered from 0 on. `kind` is what they are, `cpu` or `cuda`; `count` may grow while a cluster does.

    `depth` is how many batches each should have in hand. Of those on one machine, `sharing` share its memory, and each
    has so many of its `cores`; None: all.
    """

    @property
    def kind(self) -> str: ...

    @property
    def depth(self) -> int: ...

    @property
    def sharing(self) -> int: ...

    @property
    def cores(self) -> int | None: ...

    @property
    def count(self) -> int: ...

    def load(self, load: Load, seconds_left: Callable[[], float]) -> None:
        """Has all devices load their generators. Raises what one device alone does."""

    def ask(self, device: int, numbers: NDArray[np.int64], *, disturbed: bool) -> None:
        """Puts a batch of images into a device's hands."""

    def events(self, seconds: float) -> Sequence[Event]:
        """What has happened, waiting so many seconds for something to. Raises UsageError and CheckpointError."""
        ...

    def restart(self, device: int) -> bool:
        """Starts a device anew, whatever has become of it; False where that cannot be done any more."""
        ...

    def stop(self, device: int) -> None:
        """Ends a device; nothing of what it had in hand comes back."""

    def peak_memory(self) -> int:
        """Bytes, the most that this process has taken."""
        ...

    def close(self, patience: float = 1.0) -> None:
        """Ends everything that was started, waiting so many seconds for it to be gone. May be called from any thread,
        and twice."""

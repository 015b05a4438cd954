"""Where images come from: one device in this process (`alone`), or many through Ray (`fleet`).

The generating loop asks either for images by their numbers (`ask`) and gets `events` back. Imports neither torch nor
Ray.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from submission.log import Log

# How a device makes its images, in the words of the manifest, and what that took of it so far.
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Placement:
    """So many `devices` of a `kind`, `cpu` or `cuda`. Each computes on so many CPU `threads` (None: all); `sharing` of
    them share one machine's memory."""

    kind: str
    threads: int | None = None
    sharing: int = 1
    devices: int = 1


@dataclass(frozen=True)
class Ready:
    """A device has its generator loaded, which took so many seconds, and maybe a `network` fitted to decode with; what
    it `said` on the way (`Log.kept`)."""

    device: int
    name: str
    node: str
    facts: Facts
    seconds: float
    network: bytes | None = None
    said: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Made:
    """A device comes back with the first batch that it has in hand, as uint8 [n, 3, size, size].

    `grows`: whether its memory allows larger ones; `crowding`: how many times as long as alone its process takes at
    present, None where that is another machine's affair.
    """

    device: int
    images: NDArray[np.uint8]
    grows: bool
    crowding: float | None
    facts: Facts
    said: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Failed:
    """A device comes back without its generator, or without its first batch, or not at all: it is gone with all that it
    had in hand."""

    device: int
    error: Exception


Event = Ready | Made | Failed


class NoMemoryError(Exception):
    """A batch does not fit into a device's memory."""


class Maker(Protocol):
    """A device with its generator, in whatever process that is.

    `make` gives the images of those numbers [n], by networks that are `compiled` or not, with `Made.grows` and
    `Made.crowding`. It raises NoMemoryError, CheckpointError, and RuntimeError where the device fails.
    """

    @property
    def network(self) -> bytes | None: ...

    def facts(self) -> Facts: ...

    def make(
        self, numbers: NDArray[np.int64], *, disturbed: bool, compiled: bool
    ) -> tuple[NDArray[np.uint8], bool, float]: ...


# Loads a generator inside so many seconds of the budget, in the manner of the device with these facts and network or,
# with None, in its own. Raises UsageError and CheckpointError.
Load = Callable[[float, Facts | None, bytes | None, Log], Maker]


class Engine(Protocol):
    """Devices that make images, `count` of them, each a `placement`.

    It is `alone` where the only device is this process. Each device should have `depth` batches in hand. To end them
    takes `seconds_to_close`.
    """

    alone: bool
    depth: int
    seconds_to_close: float
    placement: Placement

    @property
    def count(self) -> int: ...
    # Has all devices load their generators.
    def load(self, load: Load, seconds_left: Callable[[], float]) -> None: ...
    # Puts a batch into a device's hands, `disturbed` by a snapshot, to be made by networks that are `compiled` or not.
    def ask(self, device: int, numbers: NDArray[np.int64], *, disturbed: bool, compiled: bool) -> None: ...
    # What has happened, waiting so many seconds for something to. Raises UsageError.
    def events(self, seconds: float) -> Sequence[Event]: ...
    # Starts a device anew, whatever has become of it; False where that cannot be.
    def restart(self, device: int) -> bool: ...
    # Ends a device; nothing of what it had in hand comes back.
    def stop(self, device: int) -> None: ...
    # Ends all that was started, waiting so many seconds for it to be gone: on any thread, and more than once.
    def close(self, patience: float = 1.0) -> None: ...

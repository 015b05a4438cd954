"""Where images come from: one device in this process (`alone`), or many through Ray (`fleet`).

The generating loop asks either for image numbers (`ask`) and gets `events` back. Imports neither torch nor Ray.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from submission.progress import Log

# How a device makes its images, in the words of the manifest, and what that took of it so far.
Facts = Mapping[str, Any]


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


def manner(facts: Facts) -> tuple[object, ...]:
    """What decides pixels, and has to be the same on all devices."""
    decoder = facts["decoder"]
    return facts["resolution"], facts["unet_dtype"], decoder["name"], decoder["dtype"], decoder["fitted_to"]


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]

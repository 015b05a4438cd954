"""Which images are still to be made."""

import numpy as np
from numpy.typing import NDArray

from submission.dataset.rounds import Spool


class ImageQueue:
    """Hands out the numbers of images in order, of `cap` rounds less those that the spool has already."""

    def __init__(self, spool: Spool, cap: int) -> None:
        self._spool = spool
        self._missing = np.array([number for number in range(cap) if number not in spool], np.int64)
        self._next = 0  # counted in images of missing rounds
        self._returned: list[NDArray[np.int64]] = []

    def take(self, count: int) -> NDArray[np.int64]:
        """The next image numbers, int64 [count] or fewer: those that were given back first."""
        while self._returned:
            numbers = self._returned.pop(0)
            numbers = numbers[~self._spool.holds(numbers)]
            if len(numbers) > count:
                self._returned.insert(0, numbers[count:])
            if len(numbers):
                return numbers[:count]
        classes = self._spool.shape[0]
        places = np.arange(self._next, min(self._next + count, len(self._missing) * classes))
        self._next += len(places)
        return self._missing[places // classes] * classes + places % classes

    def give_back(self, numbers: NDArray[np.int64]) -> None:
        """Images that whoever had taken them does not come back with: they are handed out again."""
        self._returned.append(numbers)
        self._returned.sort(key=lambda returned: int(returned[0]))

"""Which images are still to be made, and the rounds that are partly there. Imports no torch."""

import numpy as np
from numpy.typing import NDArray

from submission.rounds import Spool


class ImageQueue:
    """Hands out image numbers in order, takes images in any order, and appends every round that is whole to the spool.

    Image `number` is of class `number % classes` in round `number // classes`. Rounds that the spool has already are
    passed over; there are to be `cap` in all.
    """

    def __init__(self, spool: Spool, cap: int) -> None:
        self._spool = spool
        self._missing = np.array([number for number in range(cap) if number not in spool], np.int64)
        self._next = 0  # counted in images of missing rounds
        self._returned: list[NDArray[np.int64]] = []
        self._partly: dict[int, tuple[NDArray[np.uint8], NDArray[np.bool_]]] = {}

    @property
    def missing(self) -> int:
        """Rounds that were not there in the beginning."""
        return len(self._missing)

    def take(self, count: int) -> NDArray[np.int64]:
        """The next image numbers, int64 [count] or fewer: those that were given back first."""
        while self._returned:
            numbers = self._returned.pop(0)
            numbers = numbers[~self._there(numbers)]
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

    def put(self, numbers: NDArray[np.int64], images: NDArray[np.uint8]) -> int:
        """Takes images uint8 [n, 3, size, size]; returns how many of them were missing. Raises OutputError."""
        classes, new = self._spool.shape[0], 0
        fresh = ~self._there(numbers)
        numbers, images = numbers[fresh], images[fresh]
        for index in np.unique(numbers // classes).tolist():
            of_round = numbers // classes == index
            labels = numbers[of_round] % classes
            empty = np.empty(self._spool.shape, np.uint8), np.zeros(classes, np.bool_)
            content, there = self._partly.setdefault(index, empty)
            content[labels], there[labels] = images[of_round], True
            new += len(labels)
            if there.all():
                self._spool.append(content, index)
                del self._partly[index]
        return new

    def _there(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these images [n] have come already."""
        indices, labels = np.divmod(numbers, self._spool.shape[0])
        there = np.zeros(len(numbers), np.bool_)
        for index in np.unique(indices).tolist():
            of_round = indices == index
            if index in self._spool:
                there[of_round] = True
            elif index in self._partly:
                there[of_round] = self._partly[index][1][labels[of_round]]
        return there

"""Images are handed out in order, come back in any, and become rounds."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from submission.dataset.image_queue import ImageQueue
from submission.dataset.rounds import Spool, prepare_spool

CLASSES = 3


def make_spool(folder: Path) -> Spool:
    prepare_spool(folder, CLASSES, 2, {}, resume=False)
    return Spool(folder, CLASSES, 2)


def images_of(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A picture of each number."""
    return np.broadcast_to(numbers[:, None, None, None], (len(numbers), 3, 2, 2)).astype(np.uint8)


def pictures(spool: Spool) -> list[int]:
    rounds = spool.read()
    index = np.repeat(np.arange(len(rounds)), CLASSES), np.tile(np.arange(CLASSES), len(rounds))
    return [int(image[0, 0, 0]) for image in rounds[index]]


@settings(max_examples=50)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(1, 9), st.sampled_from("kept lost late")), max_size=20))
def test_every_image_is_made_once_whatever_is_lost_or_late(
    tmp_path_factory: pytest.TempPathFactory, cap: int, steps: list[tuple[int, str]]
) -> None:
    with make_spool(tmp_path_factory.mktemp("out") / "spool") as spool:
        queue, late, new = ImageQueue(spool, cap), [], 0
        for size, fate in steps:
            numbers = queue.take(size)
            if len(numbers) and fate != "kept":
                queue.give_back(numbers)
            if fate == "late":
                late.append(numbers)
            elif fate == "kept":
                new += spool.add(images_of(numbers), numbers)
        for numbers in reversed(late):
            new += spool.add(images_of(numbers), numbers)
        while len(numbers := queue.take(4)):
            new += spool.add(images_of(numbers), numbers)
        assert new == cap * CLASSES
        assert pictures(spool) == list(range(cap * CLASSES))


def test_what_was_lost_comes_first_and_rounds_of_a_run_before_not_at_all(tmp_path: Path) -> None:
    with make_spool(tmp_path / "spool") as spool:
        for number in (0, 2):
            spool.append(images_of(np.arange(CLASSES) + CLASSES * number), number)
        queue = ImageQueue(spool, 4)
        first, second = queue.take(2), queue.take(3)
        assert first.tolist() == [3, 4] and second.tolist() == [5, 9, 10]
        queue.give_back(second)
        queue.give_back(first)
        assert queue.take(9).tolist() == [3, 4] and queue.take(9).tolist() == [5, 9, 10]
        assert queue.take(9).tolist() == [11] and not len(queue.take(9))
        assert spool.count == 1
        spool.add(images_of(np.arange(3, 6)), np.arange(3, 6))
        assert spool.count == 3, "the one behind it was there already"

"""Images chosen from a pool: nearer to the class's mean than those made first, and the same ones every time."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from submission.dataset.rounds import Chosen, Rounds, Spool, prepare_spool
from submission.distillation.selection import Selector, herd
from submission.tasks import load_task

CPU = torch.device("cpu")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Rounds]:
    """Twenty rounds of three classes at 16 px."""
    prepare_spool(tmp_path / "spool", 3, 16, {}, resume=False)
    with Spool(tmp_path / "spool", 3, 16) as spool:
        dice = np.random.default_rng(0)
        for number in range(20):
            spool.append(dice.integers(0, 256, (3, 3, 16, 16), dtype=np.uint8), number)
        yield spool.read()


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 1000), st.data())
def test_each_image_is_the_one_that_takes_the_mean_nearest(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, rows))
    features = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32))
    chosen, mean = herd(features, count), features.double().mean(0)
    assert len(set(chosen.tolist())) == count
    for place in range(count):
        before = features[chosen[:place]].double().sum(0)
        away = (((before + features.double()) / (place + 1) - mean) ** 2).sum(1)
        away[chosen[:place]] = torch.inf
        assert away[chosen[place]] <= away.min() + 1e-4


def test_a_choice_is_nearer_to_the_class_than_the_first_images(task_file: Path, pool: Rounds) -> None:
    selector = Selector(load_task(str(task_file)), CPU)
    numbers, looked_at = selector.choose(pool, 4, 1.0, lambda: math.inf)
    assert looked_at.tolist() == [20, 20, 20] and numbers.shape == (4, 3)
    again, _ = Selector(load_task(str(task_file)), CPU).choose(pool, 4, 1.0, lambda: math.inf)
    assert np.array_equal(numbers, again), "whatever was drawn at random meanwhile"
    chosen = Chosen(pool, numbers)
    for label in range(3):
        everything = selector.features(pool[np.arange(20), np.full(20, label)])
        ours = selector.features(chosen[np.arange(len(chosen)), np.full(4, label)])
        assert torch.equal(ours, everything[numbers[:, label]])
        away = [(some.mean(0) - everything.mean(0)).norm() for some in (ours, everything[:4])]
        assert away[0] < away[1]


def test_classes_for_which_there_is_no_time_have_their_first_images(task_file: Path, pool: Rounds) -> None:
    left = itertools.chain([1e9, 1e9], itertools.repeat(0.0))
    numbers, looked_at = Selector(load_task(str(task_file)), CPU).choose(pool, 4, 1.0, lambda: next(left))
    assert looked_at.tolist() == [20, 4, 4] and numbers[:, 0].tolist() != [0, 1, 2, 3]
    assert (numbers[:, 1:] == np.arange(4)[:, None]).all()


def test_where_time_is_short_classes_are_chosen_from_fewer_rounds(
    task_file: Path, pool: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image takes a second, and a class ten: half of what it seemed at first."""
    now, left = itertools.count(), itertools.chain([60.0, 60.0, 30.0, 30.0, 11.0], itertools.repeat(11.0))
    monkeypatch.setattr("time.perf_counter", lambda: 10.0 * next(now))
    numbers, looked_at = Selector(load_task(str(task_file)), CPU).choose(pool, 4, 1.0, lambda: next(left))
    seen = [20, int(30 / 2 * 84 / 74), int(11 * 101 / 84)]
    assert looked_at.tolist() == seen and (numbers.max(0) < seen).all()


@pytest.mark.parametrize("size", [8, 64])
def test_features_take_as_much_memory_for_any_size(task_file: Path, size: int) -> None:
    task_file.write_text(task_file.read_text().replace("size = 16", f"size = {size}"))
    selector = Selector(load_task(str(task_file)), CPU)
    assert selector.features(np.zeros((2, 3, size, size), np.uint8)).shape == (2, 2048)
    assert selector.seconds_per_image() > 0

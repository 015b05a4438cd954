"""The spool, and the folder it lies in."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from submission.errors import OutputError, UsageError
from submission.output_folder import claimed, remove_unfinished, unfinished
from submission.rounds import Spool

IDENTITY = {"task": "tiny", "seed": "0"}


def make_rounds(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 3, 8, 8), dtype=np.uint8)


def fill(folder: Path, rounds: NDArray[np.uint8]) -> Path:
    """A spool with these rounds, left as by a killed job; returns its file."""
    spool = Spool(folder, 3, 8, IDENTITY, resume=False)
    for images in rounds:
        spool.append(images)
    return folder / "rounds.u8"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=20))
def test_images_are_read_as_from_an_array(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    rounds, spool = make_rounds(5), Spool(tmp_path_factory.mktemp("out") / "spool", 3, 8, IDENTITY, resume=False)
    for images in rounds:
        spool.append(images)
    read, index = spool.read(), tuple(np.array(places).T)
    assert len(read) == 5
    assert np.array_equal(read[index[0], index[1]], rounds[index[0], index[1]])


@given(st.integers(0, 5 * (3 * 3 * 8 * 8 + 4)))
@settings(max_examples=20, deadline=None)
def test_a_spool_cut_anywhere_goes_on_after_its_last_whole_round(
    tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    rounds, folder = make_rounds(5), tmp_path_factory.mktemp("out") / "spool"
    file = fill(folder, rounds)
    file.write_bytes(file.read_bytes()[:length])
    with Spool(folder, 3, 8, IDENTITY, resume=True) as spool:
        assert spool.count == length // (3 * 3 * 8 * 8 + 4)
        for images in rounds[spool.count :]:
            spool.append(images)
        everything = np.repeat(np.arange(5), 3), np.tile(np.arange(3), 5)
        assert np.array_equal(spool.read()[everything].reshape(rounds.shape), rounds)


def test_a_spool_of_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    fill(tmp_path / "spool", make_rounds(2))
    with pytest.raises(UsageError, match="seed was 0 and is now 7"):
        Spool(tmp_path / "spool", 3, 8, {**IDENTITY, "seed": "7"}, resume=True)
    (tmp_path / "spool/identity.json").write_text("[]")
    with pytest.raises(UsageError, match="is damaged"):
        Spool(tmp_path / "spool", 3, 8, IDENTITY, resume=True)
    with Spool(tmp_path / "spool", 3, 8, IDENTITY, resume=False) as spool:
        assert spool.found == 2 and spool.count == 0
    assert not (tmp_path / "spool").exists(), "an empty one is of no use"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_is_said_with_what_a_round_needs_and_the_rounds_stay(tmp_path: Path) -> None:
    rounds = make_rounds(3)
    with Spool(tmp_path / "spool", 3, 8, IDENTITY, resume=False) as spool:
        with file_size_limit(1500), pytest.raises(OutputError, match=r"needs 0\.0 MB there, and 2 of them are done"):
            for images in rounds:
                spool.append(images)
        assert spool.count == 2
    with Spool(tmp_path / "spool", 3, 8, IDENTITY, resume=True) as spool:
        assert spool.count == 2


def test_a_folder_is_one_job_s_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path / "out"), pytest.raises(OutputError, match="another job"), claimed(tmp_path / "out"):
        pass
    with claimed(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --output"), claimed(tmp_path / "file"):
        pass


def test_unfinished_files_of_the_same_task_are_removed_and_no_others(tmp_path: Path) -> None:
    names = {unfinished(tmp_path / "tiny.pt", 1).name, unfinished(tmp_path / "tiny.pt", 2).name}
    others = {"tiny.pt", unfinished(tmp_path / "tiny2.pt", 1).name}
    for name in names | others:
        (tmp_path / name).write_text("")
    assert remove_unfinished(tmp_path, "tiny") == 2
    assert {path.name for path in tmp_path.iterdir()} == others

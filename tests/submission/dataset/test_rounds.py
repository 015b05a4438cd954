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

from submission.dataset.rounds import Spool, prepare_spool, remove_if_empty
from submission.errors import OutputError, UsageError
from submission.machine.disk import claimed, release, remove_unfinished, unfinished

IDENTITY = {"task": "tiny", "seed": "0"}
# Bytes of a round with its number and checksum.
STRIDE = 3 * 3 * 8 * 8 + 8


def make_rounds(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 3, 8, 8), dtype=np.uint8)


def make_spool(folder: Path, rounds: NDArray[np.uint8]) -> Spool:
    """A spool in which these rounds have been made."""
    prepare_spool(folder, 3, 8, IDENTITY, resume=False)
    spool = Spool(folder, 3, 8)
    for number, images in enumerate(rounds):
        spool.append(images, number)
    return spool


def resume(folder: Path) -> Spool:
    prepare_spool(folder, 3, 8, IDENTITY, resume=True)
    return Spool(folder, 3, 8)


def everything(spool: Spool) -> NDArray[np.uint8]:
    """All rounds in their order."""
    rounds = spool.read()
    index = np.repeat(np.arange(len(rounds)), 3), np.tile(np.arange(3), len(rounds))
    return rounds[index].reshape(-1, *spool.shape)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=20))
def test_images_are_read_as_from_an_array(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    rounds = make_rounds(5)
    read, index = make_spool(tmp_path_factory.mktemp("out") / "spool", rounds).read(), tuple(np.array(places).T)
    assert len(read) == 5
    assert np.array_equal(read[index[0], index[1]], rounds[index[0], index[1]])


@given(st.integers(0, 5 * STRIDE))
@settings(max_examples=20)
def test_a_spool_cut_anywhere_keeps_its_whole_rounds(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    rounds, folder = make_rounds(5), tmp_path_factory.mktemp("out") / "spool"
    make_spool(folder, rounds)
    file = folder / "rounds.u8"
    file.write_bytes(file.read_bytes()[:length])
    with resume(folder) as spool:
        assert spool.count == spool.before == length // STRIDE
        for number in range(spool.count, 5):
            spool.append(rounds[number], number)
        assert np.array_equal(everything(spool), rounds)


@given(st.integers(0, 5 * STRIDE - 1))
@settings(max_examples=20)
def test_a_torn_round_costs_itself_alone(tmp_path_factory: pytest.TempPathFactory, place: int) -> None:
    rounds, folder = make_rounds(5), tmp_path_factory.mktemp("out") / "spool"
    make_spool(folder, rounds)
    with (folder / "rounds.u8").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with resume(folder) as spool:
        torn = place // STRIDE
        assert spool.before == 4 and spool.count == torn, "up to it, and those behind it wait for it"
        assert torn not in spool
        spool.append(rounds[torn], torn)
        assert np.array_equal(everything(spool), rounds)


@settings(max_examples=20)
@given(st.permutations(range(6)), st.integers(0, 6))
def test_rounds_come_in_any_order_and_count_up_to_the_first_that_is_missing(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], count: int
) -> None:
    rounds, folder = make_rounds(6), tmp_path_factory.mktemp("out") / "spool"
    with make_spool(folder, rounds[:0]) as spool:
        for number in order[:count]:
            spool.append(rounds[number], number)
        whole = next(number for number in range(7) if number not in order[:count])
        assert spool.count == len(spool.read()) == whole
        assert np.array_equal(everything(spool), rounds[:whole])
    with resume(folder) as spool:
        assert spool.before == count and spool.count == whole


def test_a_spool_of_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    make_spool(folder, make_rounds(2))
    with pytest.raises(UsageError, match="seed was 0 and is now 7"):
        prepare_spool(folder, 3, 8, {**IDENTITY, "seed": "7"}, resume=True)
    with pytest.raises(UsageError, match="task was tiny and is now large"):  # of rounds that are no whole one of these
        prepare_spool(folder, 300, 8, {**IDENTITY, "task": "large"}, resume=True)
    (folder / "identity.json").write_text("[]")
    with pytest.raises(UsageError, match="is damaged"):
        prepare_spool(folder, 3, 8, IDENTITY, resume=True)
    remove_if_empty(folder)
    assert prepare_spool(folder, 3, 8, IDENTITY, resume=False) == 2
    with Spool(folder, 3, 8) as spool:
        assert spool.count == 0
    remove_if_empty(folder)
    assert not folder.exists(), "an empty one is of no use"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_is_said_with_what_a_round_needs_and_the_rounds_stay(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    with make_spool(folder, make_rounds(2)) as spool:
        with file_size_limit(1500), pytest.raises(OutputError, match=r"needs 0\.0 MB there, and 2 of them are done"):
            spool.append(make_rounds(1)[0], 2)
        assert spool.count == 2
    with resume(folder) as spool:
        assert spool.count == 2


def test_a_folder_is_one_job_s_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with claimed(folder):
        with pytest.raises(OutputError, match="another job"), claimed(folder):
            pass
        assert len(list(folder.iterdir())) == 1, "whoever was refused has removed nothing"
    assert not list(folder.iterdir())
    with claimed(folder):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --output"), claimed(tmp_path / "file"):
        pass


def test_a_folder_given_back_is_another_job_s(tmp_path: Path) -> None:
    with claimed(tmp_path):
        release(tmp_path)
        with claimed(tmp_path):
            held = list(tmp_path.iterdir())
        assert len(held) == 1
    assert not list(tmp_path.iterdir())


def test_unfinished_files_of_the_same_task_are_removed_and_no_others(tmp_path: Path) -> None:
    names = {unfinished(tmp_path / "tiny.pt").name, unfinished(tmp_path / "tiny.pt").name}
    others = {"tiny.pt", unfinished(tmp_path / "tiny2.pt").name}
    for name in names | others:
        (tmp_path / name).write_text("")
    assert remove_unfinished(tmp_path, "tiny") == 2
    assert {path.name for path in tmp_path.iterdir()} == others

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
from submission.output_folder import claimed, release, remove_unfinished, unfinished
from submission.rounds import Spool, prepare_spool, remove_if_empty

IDENTITY = {"task": "tiny", "seed": "0"}
# Bytes of a round with its number and checksum.
STRIDE = 3 * 3 * 8 * 8 + 8


def make_rounds(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 3, 8, 8), dtype=np.uint8)


def make_spool(folder: Path, rounds: NDArray[np.uint8], rank: int = 0, ranks: int = 1) -> Spool:
    """A spool in which a rank has made its share of these rounds."""
    if not folder.exists():
        prepare_spool(folder, 3, 8, IDENTITY, resume=False)
    spool = Spool(folder, 3, 8, rank)
    for number in range(rank, len(rounds), ranks):
        spool.append(rounds[number], number)
    return spool


def resume(folder: Path, rank: int = 0) -> Spool:
    prepare_spool(folder, 3, 8, IDENTITY, resume=True)
    return Spool(folder, 3, 8, rank)


def everything(spool: Spool) -> NDArray[np.uint8]:
    """All rounds in their order."""
    rounds = spool.read()
    index = np.repeat(np.arange(len(rounds)), 3), np.tile(np.arange(3), len(rounds))
    return rounds[index].reshape(-1, *spool.shape)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=20))
def test_images_are_read_as_from_an_array(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    rounds = make_rounds(5)
    read, index = make_spool(tmp_path_factory.mktemp("out") / "spool", rounds).read(), tuple(np.array(places).T)
    assert len(read) == 5
    assert np.array_equal(read[index[0], index[1]], rounds[index[0], index[1]])


@given(st.integers(0, 5 * STRIDE))
@settings(max_examples=20, deadline=None)
def test_a_spool_cut_anywhere_keeps_its_whole_rounds(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    rounds, folder = make_rounds(5), tmp_path_factory.mktemp("out") / "spool"
    make_spool(folder, rounds)
    file = folder / "rank-0.u8"
    file.write_bytes(file.read_bytes()[:length])
    with resume(folder) as spool:
        assert spool.count == len(spool.before) == length // STRIDE
        for number in range(spool.count, 5):
            spool.append(rounds[number], number)
        assert np.array_equal(everything(spool), rounds)


@given(st.integers(0, 5 * STRIDE - 1))
@settings(max_examples=20, deadline=None)
def test_a_torn_round_costs_itself_alone(tmp_path_factory: pytest.TempPathFactory, place: int) -> None:
    rounds, folder = make_rounds(5), tmp_path_factory.mktemp("out") / "spool"
    make_spool(folder, rounds)
    with (folder / "rank-0.u8").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with resume(folder) as spool:
        left = [number for number in range(5) if number != place // STRIDE]
        assert spool.before.tolist() == left
        assert np.array_equal(everything(spool), rounds[left])


def test_every_rank_sees_the_rounds_of_all_in_their_order(tmp_path: Path) -> None:
    rounds, folder = make_rounds(7), tmp_path / "spool"
    spools = [make_spool(folder, rounds, rank, 3) for rank in range(3)]
    for spool in spools:
        spool.look()
        assert np.array_equal(everything(spool), rounds)
        assert spool.by_rank() == {0: 3, 1: 2, 2: 2}
    assert np.array_equal(spools[1].read().first(4).numbers, np.arange(4))


def test_a_round_that_is_still_on_its_way_is_seen_later(tmp_path: Path) -> None:
    """On a network disk a file may have its length before its content."""
    rounds, folder = make_rounds(2), tmp_path / "spool"
    make_spool(folder, rounds, 1, 1)
    file = folder / "rank-1.u8"
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    reader = make_spool(folder, rounds[:0])
    reader.look()
    assert reader.count == 0
    file.write_bytes(whole)
    reader.look()
    assert reader.count == 1 and np.array_equal(everything(reader), rounds[1:])


def test_another_number_of_ranks_goes_on_from_what_there_is(tmp_path: Path) -> None:
    rounds, folder = make_rounds(8), tmp_path / "spool"
    for rank, count in ((0, 6), (1, 8), (2, 3)):  # they got to different places: 0, 3; 1, 4, 7; 2
        make_spool(folder, rounds[:count], rank, 3)
    with resume(folder) as spool:
        assert spool.before.tolist() == [0, 1, 2, 3, 4, 7]
        spool.append(rounds[5], 5)
    with resume(folder) as spool:
        assert spool.before.tolist() == [0, 1, 2, 3, 4, 5, 7]
        assert np.array_equal(everything(spool), rounds[spool.before])


def test_a_spool_of_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    make_spool(folder, make_rounds(2))
    with pytest.raises(UsageError, match="seed was 0 and is now 7"):
        prepare_spool(folder, 3, 8, {**IDENTITY, "seed": "7"}, resume=True)
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


@contextmanager
def job(folder: Path, name: str, calls: list[str]) -> Iterator[float | None]:
    with claimed(folder, name, 5.0, lambda: calls.append("prepare"), lambda: calls.append("clear")) as began:
        yield began


def test_a_folder_is_one_job_s_at_a_time_with_all_its_processes(tmp_path: Path) -> None:
    folder, calls = tmp_path / "out", list[str]()
    with job(folder, "a", calls) as first, job(folder, "a", calls) as second:
        assert (first, second) == (None, 5.0), "the second is told when the first began"
        with pytest.raises(OutputError, match="another job"), job(folder, "b", calls):
            pass
        assert calls == ["prepare"]
    assert calls == ["prepare", "clear"] and not list(folder.iterdir())
    with job(folder, "b", calls) as began:
        assert began is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --output"), job(tmp_path / "file", "a", calls):
        pass


def test_a_folder_given_back_is_another_job_s(tmp_path: Path) -> None:
    calls: list[str] = []
    with job(tmp_path, "a", calls):
        release(tmp_path)
        with job(tmp_path, "b", calls):
            pass
        assert calls == ["prepare", "prepare", "clear"]
    assert len(calls) == 3, "whoever gave it back has nothing to clear"


def test_unfinished_files_of_the_same_task_are_removed_and_no_others(tmp_path: Path) -> None:
    names = {unfinished(tmp_path / "tiny.pt").name, unfinished(tmp_path / "tiny.pt").name}
    others = {"tiny.pt", unfinished(tmp_path / "tiny2.pt").name}
    for name in names | others:
        (tmp_path / name).write_text("")
    assert remove_unfinished(tmp_path, "tiny") == 2
    assert {path.name for path in tmp_path.iterdir()} == others

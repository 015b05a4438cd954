"""The thread that writes snapshots, given up at the worst moment."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from submission.dataset.dataset_file import FileSpec
from submission.dataset.rounds import Rounds, Spool, prepare_spool
from submission.job import snapshots
from submission.job.snapshots import SnapshotWriter
from submission.plan.estimates import Extent
from submission.tasks import load_task


@pytest.fixture
def rounds(tmp_path: Path) -> Iterator[Rounds]:
    prepare_spool(tmp_path / "spool", 100, 32, {}, resume=False)
    with Spool(tmp_path / "spool", 100, 32) as spool:
        spool.append(np.random.default_rng(0).integers(0, 256, spool.shape, dtype=np.uint8), 0)
        yield spool.read()


def test_one_that_is_given_up_while_it_waits_does_not_come_into_place(
    rounds: Rounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ready, and the last file is being put in place: then it must not take its place."""
    monkeypatch.setattr(snapshots, "ABANDON_PATIENCE", 0.0)
    file, waits, placing = tmp_path / "cifar100.pt", threading.Event(), threading.Event()

    @contextmanager
    def in_turn() -> Iterator[None]:
        waits.set()
        placing.wait()
        yield

    writer = SnapshotWriter()
    spec = FileSpec(load_task("cifar100"), 1, "natural", 0, torch.float32)
    writer.start(file, rounds, spec, Extent(1, 1), in_turn(), lambda: None)
    assert waits.wait(60)
    writer.abandon()
    file.write_text("the last file")
    placing.set()
    while writer.busy:
        time.sleep(0.01)
    assert file.read_text() == "the last file" and writer.collect() is None
    assert {path.name for path in tmp_path.iterdir()} == {"cifar100.pt", "spool"}

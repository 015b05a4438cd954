"""Launchers that start several processes: the first drives this machine's devices."""

import os

import pytest

from submission import cli
from submission.errors import UsageError
from submission.launchers import LAUNCHERS, rank_and_count


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without whatever launcher the tests themselves run under."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or any(name in names for names in LAUNCHERS):
            monkeypatch.delenv(name)


def under(monkeypatch: pytest.MonkeyPatch, **told: int) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


def test_a_process_alone_is_the_first_of_one() -> None:
    assert rank_and_count() == (0, 1)


@pytest.mark.parametrize(
    "told",
    [
        {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4},
        {"OMPI_COMM_WORLD_RANK": 2, "OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_LOCAL_SIZE": 4},
        {"PMI_RANK": 2, "PMI_SIZE": 4},
        {"SLURM_PROCID": 2, "SLURM_STEP_NUM_TASKS": 4, "SLURM_STEP_NUM_NODES": 1},
    ],
    ids=lambda told: next(iter(told)),
)
def test_one_of_several_leaves_at_once(
    told: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    under(monkeypatch, **told)
    assert rank_and_count() == (2, 4)
    assert cli.main(["cifar100", "--output", "/no/where"]) == 0
    assert capsys.readouterr().out == "process 2 of 4 leaves: the first one drives all devices of this machine\n"


@pytest.mark.parametrize(
    "told",
    [
        {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4},
        {"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 8, "SLURM_STEP_NUM_NODES": 2},
    ],
    ids=lambda told: next(iter(told)),
)
def test_several_machines_are_shown_the_way(
    told: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    under(monkeypatch, **told)
    assert cli.main(["cifar100"]) == 2
    said = capsys.readouterr().err
    assert "ray symmetric-run --address HEAD:6379" in said and len(said.splitlines()) == 1


def test_what_is_no_number_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "two")
    with pytest.raises(UsageError, match="PMI_SIZE=two in the environment"):
        rank_and_count()

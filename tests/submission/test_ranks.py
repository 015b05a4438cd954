"""Several processes on one job: they share out the rounds, and none is needed. Real processes, really killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from submission.dataset_file import Recipe, write_dataset
from submission.errors import OutputError, UsageError
from submission.manifest import write_whole
from submission.output_folder import remove_unfinished
from submission.ranks import WORLD_SIZES, Place, find_place
from submission.rounds import share_of_rounds
from submission.tasks import load_task
from tests import forked
from tools.audit import audit

ROOT = Path(__file__).resolve().parents[2]
TASK = load_task("cifar100")
# Not to be reached, and no copies: as many images a class as rounds. A round in one go, for budgets of seconds: on a
# busy machine, images one by one take most of that.
ENDLESS = ("--max-ipc", "100000", "--aug-per-image", "0", "--batch-size", "100")


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    forked.warm_up()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without whatever launcher the tests themselves run under."""
    for name in list(os.environ):
        if name in WORLD_SIZES or name.startswith(("SLURM_", "MASTER_", "RANK", "LOCAL_", "BANKO_JOB", "TORCHELASTIC")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_alone_is_a_job_of_its_own(environment: pytest.MonkeyPatch) -> None:
    places = find_place(), find_place()
    assert all((place.rank, place.ranks, place.local_rank, place.local_ranks) == (0, 1, 0, 1) for place in places)
    assert places[0].job != places[1].job


def test_torchrun_and_accelerate_say_who_is_who(environment: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_PORT": 7}.items():
        environment.setenv(name, str(value))
    place = find_place()
    assert (place.rank, place.ranks, place.local_rank, place.local_ranks) == (5, 8, 1, 4)
    assert find_place().job == place.job


def test_slurm_s_tasks_are_ranks(environment: pytest.MonkeyPatch) -> None:
    told = {"JOB_ID": 12, "STEP_ID": 0, "PROCID": 3, "STEP_NUM_TASKS": 4, "LOCALID": 1}
    for name, value in told.items():
        environment.setenv(f"SLURM_{name}", str(value))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.setenv(name, "")  # to be put back in the end
        environment.delenv(name)
    place = find_place()
    assert (place.rank, place.ranks, place.local_rank, place.local_ranks) == (3, 4, 1, 1)


def test_processes_that_cannot_know_each_other_are_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="BANKO_JOB"):
        find_place()
    environment.setenv("BANKO_JOB", "mine")
    environment.setenv("OMPI_COMM_WORLD_RANK", "2")
    with pytest.raises(UsageError, match="rank 2 of 2"):
        find_place()


def test_rounds_are_dealt_out_in_turn_without_those_that_are_there() -> None:
    def shares(cap: int, before: Sequence[int], ranks: int) -> list[list[int]]:
        there = np.array(before, np.int64)
        return [share_of_rounds(cap, there, Place("job", rank, ranks)).tolist() for rank in range(ranks)]

    assert shares(7, [], 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert shares(7, [0, 1, 4, 9], 2) == [[2, 5], [3]], "seven in all"
    assert shares(2, [0, 1, 2], 1) == [[]]


def test_a_writer_replaced_at_the_last_moment_puts_nothing_in_place(tmp_path: Path) -> None:
    """Between its last look and the renaming of the file, which it finds gone."""
    rounds = np.random.default_rng(0).integers(0, 256, (1, 100, 3, 32, 32), dtype=np.uint8)
    recipe = Recipe(TASK, 1, "none", 0, torch.float32)

    def replace(fraction: float) -> None:
        if fraction == 1:
            remove_unfinished(tmp_path, "cifar100")

    with pytest.raises(OutputError):
        write_dataset(tmp_path / "cifar100.pt", rounds, recipe, replace)
    with pytest.raises(OutputError):
        write_whole(tmp_path / "cifar100.json", b"{}", lambda: replace(1))
    assert not list(tmp_path.iterdir())


def said(output: Path) -> str:
    return output.with_suffix(".log").read_text()


def start_ranks(output: Path, ranks: int, *options: str, fault: str = "") -> list[ForkServerProcess]:
    """Ranks of one job that have all made a round, the first file in place."""
    processes = [forked.start(output, *options, fault=fault, rank=rank, ranks=ranks) for rank in range(ranks)]
    spool = output / ".cifar100.spool"

    def at_work() -> bool:
        files = [spool / f"rank-{rank}.u8" for rank in range(ranks)]
        return (output / "cifar100.pt").exists() and all(file.exists() and file.stat().st_size for file in files)

    forked.wait_for(at_work, processes[0])
    assert all(process.is_alive() for process in processes), said(output)
    return processes


def send(process: ForkServerProcess, number: signal.Signals) -> None:
    assert process.pid
    os.kill(process.pid, number)


def end(process: ForkServerProcess, seconds: float = 60) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "still there"
    return process.exitcode


def images_of(output: Path) -> Tensor:
    images: Tensor = torch.load(output / "cifar100.pt", weights_only=True)
    return images


def check(output: Path) -> dict[str, Any]:
    """The manifest of a file that passes the audit, of the size that it says."""
    manifest: dict[str, Any] = json.loads((output / "cifar100.json").read_text())
    assert [finding.text for finding in audit(output / "cifar100.pt", TASK) if finding.fatal] == []
    assert len(images_of(output)) == 100 * manifest["ipc"] and manifest["ipc"] == manifest["rounds"]
    return manifest


def only_ranks_rounds_are_left_out(manifest: dict[str, Any], rank: int) -> None:
    """Below the highest round in the file, nothing is missing that another rank has made."""
    ranks, by_rank = manifest["processes"], manifest["rounds_by_rank"]
    for number in manifest["rounds_left_out"]:
        maker = number % ranks
        assert maker == rank or number // ranks >= by_rank[maker], manifest
    assert manifest["rounds"] == sum(by_rank)


def test_two_processes_make_the_file_that_one_makes(tmp_path: Path) -> None:
    options = ("--max-ipc", "13", "--aug-per-image", "2", "--batch-size", "100")
    files = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        processes = [forked.start(output, *options, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert [end(process) for process in processes] == [0] * ranks, said(output)
        files.append(images_of(output))
        manifest = json.loads((output / "cifar100.json").read_text())
        assert manifest["processes"] == ranks and manifest["rounds"] == 13 and manifest["warnings"] == []
        assert manifest["rounds_by_rank"] == ([13] if ranks == 1 else [7, 6])
        names = {path.name for path in output.iterdir()}
        assert names == {f"cifar100.{kind}" for kind in ("html", "json", "png", "pt")}
    assert torch.equal(*files)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_killed_worker_costs_only_its_own_rounds(tmp_path: Path, ranks: int) -> None:
    output, began = tmp_path / "out", time.time()
    processes = start_ranks(output, ranks, *ENDLESS, "--budget", "16s", "--started-at", str(began))
    send(processes[-1], signal.SIGKILL)
    assert [end(process) for process in processes] == [0] * (ranks - 1) + [-signal.SIGKILL], said(output)
    assert time.time() - began < 16
    manifest = check(output)
    assert manifest["ranks_gone"] == [ranks - 1]
    assert any(f"rank {ranks - 1} shows no sign of life" in warning for warning in manifest["warnings"])
    only_ranks_rounds_are_left_out(manifest, ranks - 1)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_another_takes_over_from_a_killed_writer(tmp_path: Path, ranks: int) -> None:
    output, began = tmp_path / "out", time.time()
    processes = start_ranks(output, ranks, *ENDLESS, "--budget", "18s", "--started-at", str(began))
    send(processes[0], signal.SIGKILL)
    assert [end(process) for process in processes] == [-signal.SIGKILL] + [0] * (ranks - 1), said(output)
    assert time.time() - began < 18
    manifest = check(output)
    assert any("rank 1 writes the files from now on" in warning for warning in manifest["warnings"])
    assert manifest["rounds_by_rank"][0] >= 1, "what it had done counts"
    only_ranks_rounds_are_left_out(manifest, 0)


@pytest.mark.long
def test_a_stopped_worker_costs_only_its_own_rounds(tmp_path: Path) -> None:
    output, began = tmp_path / "out", time.time()
    processes = start_ranks(output, 2, *ENDLESS, "--budget", "16s", "--started-at", str(began))
    send(processes[1], signal.SIGSTOP)
    assert end(processes[0]) == 0 and time.time() - began < 16, said(output)
    manifest = check(output)
    assert manifest["ranks_gone"] == [1]
    only_ranks_rounds_are_left_out(manifest, 1)
    send(processes[1], signal.SIGCONT)
    end(processes[1])
    assert check(output) == manifest, "one that comes back when all is over changes nothing"


@pytest.mark.long
def test_a_worker_whose_device_does_not_answer_is_not_waited_for(tmp_path: Path) -> None:
    output, began = tmp_path / "out", time.time()
    options = (*ENDLESS, "--budget", "16s", "--started-at", str(began))
    faults = ("", "stuck_device")
    processes = [forked.start(output, *options, fault=faults[rank], rank=rank, ranks=2) for rank in range(2)]
    assert [end(process) for process in processes] == [0, 0] and time.time() - began < 16, said(output)
    manifest = check(output)
    assert "rank 1 was still at work at the end" in said(output)
    only_ranks_rounds_are_left_out(manifest, 1)


@pytest.mark.long
def test_a_stopped_writer_is_replaced_and_does_no_harm_when_it_comes_back(tmp_path: Path) -> None:
    output, began = tmp_path / "out", time.time()
    processes = start_ranks(output, 2, *ENDLESS, "--budget", "22s", "--started-at", str(began))
    send(processes[0], signal.SIGSTOP)
    forked.wait_for(lambda: "rank 1 writes the files from now on" in said(output), processes[1])
    send(processes[0], signal.SIGCONT)
    assert [end(process) for process in processes] == [0, 0] and time.time() - began < 22, said(output)
    assert "rank 1 writes the files by now" in said(output)
    manifest = check(output)
    assert manifest["ranks_gone"] == [] and min(manifest["rounds_by_rank"]) >= 1
    only_ranks_rounds_are_left_out(manifest, 0)


def test_a_rank_that_comes_when_all_is_over_changes_nothing(tmp_path: Path) -> None:
    output, options = tmp_path / "out", ("--max-ipc", "5", "--aug-per-image", "0", "--started-at", str(time.time()))
    assert end(forked.start(output, *options, rank=0, ranks=2)) == 0
    manifest = check(output)
    assert manifest["rounds_by_rank"] == [3, 0] and manifest["ranks_gone"] == [1], "the other never came"
    assert manifest["rounds_left_out"] == [1, 3]
    assert end(forked.start(output, *options, rank=1, ranks=2)) == 5 and "before this one came" in said(output)
    assert check(output) == manifest


def test_a_stopped_job_s_rounds_are_taken_up_by_another_number_of_ranks(tmp_path: Path) -> None:
    output = tmp_path / "out"
    processes = start_ranks(output, 2, *ENDLESS)
    for process in processes:
        send(process, signal.SIGTERM)
    assert [end(process) for process in processes] == [0, 0], said(output)
    files = (output / ".cifar100.spool").glob("*.u8")
    made = sum(file.stat().st_size // (100 * 3 * 32 * 32 + 8) for file in files)
    options = ("--resume", "--max-ipc", str(made + 5), "--aug-per-image", "0")
    processes = [forked.start(output, *options, rank=rank, ranks=3) for rank in range(3)]
    assert [end(process) for process in processes] == [0, 0, 0], said(output)
    manifest = check(output)
    assert manifest["resumed_rounds"] == made and manifest["rounds"] == made + 5
    all_rounds = str(manifest["rounds"] + len(manifest["rounds_left_out"]))
    assert end(forked.start(tmp_path / "one", "--max-ipc", all_rounds, "--aug-per-image", "0")) == 0
    one, three = (images_of(tmp_path / name).unflatten(0, (100, -1)) for name in ("one", "out"))  # type: ignore[no-untyped-call]
    numbers = np.setdiff1d(np.arange(int(all_rounds)), manifest["rounds_left_out"])
    assert (one[:, numbers] - three).abs().max() * max(TASK.std) < 1.5 / 255


def test_a_job_of_other_processes_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    processes = start_ranks(output, 2, *ENDLESS)
    other = forked.start(output, "--max-ipc", "1")
    assert end(other) == 5 and "another job is writing to" in said(output)
    for process in processes:
        send(process, signal.SIGTERM)
    assert [end(process) for process in processes] == [0, 0]


def test_the_launcher_hands_on_what_it_is_told(tmp_path: Path) -> None:
    options = [*ENDLESS, "--processes", "2", "--model", "embedded", "--device", "cpu", "--output", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "submission", "cifar100", *options], cwd=ROOT)
    while not (tmp_path / "cifar100.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(15) == 0
    manifest = json.loads((tmp_path / "cifar100.json").read_text())
    assert any("told to stop (SIGTERM)" in warning for warning in manifest["warnings"])


@pytest.mark.long
def test_sixty_four_ranks_lose_no_time_to_each_other(tmp_path: Path) -> None:
    """On devices that are made up; everything else is the real job, on fewer cores than there are ranks."""
    output, began, budget, ranks = tmp_path / "out", time.time(), 24, 64
    options = (*ENDLESS, "--batch-size", "10", "--budget", f"{budget}s", "--started-at", str(began))
    processes = [forked.start(output, *options, fault="slow_device", rank=k, ranks=ranks) for k in range(ranks)]
    assert [end(process) for process in processes] == [0] * ranks, said(output)
    assert time.time() - began < budget
    manifest = json.loads((output / "cifar100.json").read_text())
    assert manifest["ranks_gone"] == [] and min(manifest["rounds_by_rank"]) >= 1
    assert manifest["rounds"] == manifest["ipc"] > ranks
    overheads = []
    for rank in range(ranks):
        batches, took = map(float, Path(f"{output}.times-{rank}").read_text().split())
        overheads.append(1 - batches * forked.STUB_SECONDS / took)
    assert np.mean(overheads) < 0.02, sorted(overheads)

"""How jobs end: killed, told to stop, at the deadline, out of room. Real processes, on the embedded checkpoint."""

import json
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from submission.dataset.rounds import Spool
from submission.tasks import load_task
from tests import forked
from tests.forked import end, kill, said
from tools.scoring.findings import audit

TASK = load_task("cifar100")
# Not to be reached.
NO_CAP = ("--max-ipc", "100000")
POOL = ("--select", "auto", "--pool")
# A round in one go, for budgets of seconds: on a busy machine, images one by one take most of that.
AT_ONCE = ("--batch-size", "100")
# Docker's ten seconds, and some for the machine.
GRACE = 8.0


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    forked.warm_up()


def check_file(output: Path) -> Tensor:
    """The images of a complete file that passes the audit."""
    assert [finding.text for finding in audit(output / "cifar100.pt", TASK) if finding.fatal] == []
    images: Tensor = torch.load(output / "cifar100.pt", weights_only=True)
    return images


def manifest_of(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "cifar100.json").read_text())
    assert len(check_file(output)) == 100 * content["ipc"], "file and manifest agree"
    return content


def start_and_wait(output: Path, *options: str, **wrong: Any) -> ForkServerProcess:
    """A job whose first file is in place."""
    process = forked.start(output, *options, **wrong)
    forked.wait_for((output / "cifar100.pt").exists, process)
    assert process.is_alive(), said(output)
    return process


def test_a_longer_run_extends_a_shorter_one(tmp_path: Path) -> None:
    def stopped_past(output: Path, size: int) -> int:
        """Runs until the spool is larger; returns its size in the end."""
        process = start_and_wait(output, "--budget", output.name, "--aug-per-image", "0", *NO_CAP)
        spool = output / ".cifar100.spool/rounds.u8"
        forked.wait_for(lambda: spool.stat().st_size > size, process)
        kill(process, signal.SIGTERM)
        assert end(process) == 0, said(output)
        return spool.stat().st_size

    outputs = tmp_path / "1m", tmp_path / "10m"
    stopped_past(outputs[1], stopped_past(outputs[0], 0))
    short, long = (check_file(output).unflatten(0, (100, -1)) for output in outputs)  # type: ignore[no-untyped-call]
    rounds = short.shape[1]
    assert rounds < long.shape[1]
    std = torch.tensor(TASK.std).view(3, 1, 1)
    assert ((short - long[:, :rounds]).abs() * std * 255).max() < 1.5, "one 8-bit level"


def test_every_image_gets_its_copies_where_the_cap_leaves_room(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start_and_wait(output, *NO_CAP)
    kill(process, signal.SIGTERM)
    assert end(process) == 0, said(output)
    manifest = manifest_of(output)
    assert manifest["ipc"] == 5 * manifest["rounds"], "every image and its four copies"


@pytest.mark.parametrize("trials", [8, pytest.param(50, marks=pytest.mark.long)])
def test_a_job_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path, trials: int) -> None:
    def trial(seed: int) -> None:
        dice, output = random.Random(seed), tmp_path / str(seed)
        process = start_and_wait(output, *NO_CAP)
        time.sleep(dice.uniform(0, 1.2))
        kill(process, signal.SIGKILL)
        assert end(process) == -signal.SIGKILL
        check_file(output)
        shutil.rmtree(output)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(trial, range(trials)))


@pytest.mark.parametrize("trials", [4, pytest.param(20, marks=pytest.mark.long)])
def test_a_job_told_to_stop_at_any_moment_finishes_its_file(tmp_path: Path, trials: int) -> None:
    def trial(seed: int) -> None:
        dice, output = random.Random(seed), tmp_path / str(seed)
        process = start_and_wait(output, *NO_CAP)
        time.sleep(dice.uniform(0, 1.2))
        told = time.monotonic()
        number = dice.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
        kill(process, number)
        assert end(process, GRACE) == 0, said(output)
        assert time.monotonic() - told < GRACE
        manifest = manifest_of(output)
        assert any(f"told to stop ({number.name})" in warning for warning in manifest["warnings"])
        assert (output / ".cifar100.spool").stat(), "for --resume"
        shutil.rmtree(output)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(trial, range(trials)))


def test_under_nohup_a_lost_terminal_is_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start_and_wait(output, *NO_CAP, fault=forked.without_hangups)
    kill(process, signal.SIGHUP)
    time.sleep(0.5)
    assert process.is_alive() and "told to stop" not in said(output)
    kill(process, signal.SIGTERM)
    assert end(process) == 0


def test_a_second_signal_ends_the_job_at_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start_and_wait(output, *NO_CAP, device=forked.stuck_device)
    forked.wait_for(lambda: "the device is stuck" in said(output), process)
    kill(process, signal.SIGINT)
    time.sleep(0.1)
    kill(process, signal.SIGINT)
    assert end(process, 1) == 128 + signal.SIGINT
    check_file(output)


def test_a_device_that_does_not_answer_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start_and_wait(output, *NO_CAP, device=forked.stuck_device)
    forked.wait_for(lambda: "the device is stuck" in said(output), process)
    kill(process, signal.SIGTERM)
    assert end(process, GRACE) == 0
    assert manifest_of(output)["rounds"] >= forked.FAULT_AFTER and "does not come back" in said(output)


def test_a_device_that_does_not_answer_does_not_hold_up_the_deadline(tmp_path: Path) -> None:
    output, began = tmp_path / "out", time.time()
    options = (*NO_CAP, *AT_ONCE, "--aug-per-image", "0", "--budget", "12s", "--started-at", str(began))
    process = forked.start(output, *options, device=forked.stuck_device)
    assert end(process) == 0 and time.time() - began < 12
    manifest = manifest_of(output)
    assert manifest["rounds"] >= forked.FAULT_AFTER, "all that was done"
    assert any("does not come back" in warning for warning in manifest["warnings"])


def test_file_and_manifest_agree_whatever_happens_at_the_deadline(tmp_path: Path) -> None:
    output, options = tmp_path / "out", (*NO_CAP, *AT_ONCE, "--aug-per-image", "0", "--budget", "10s")
    process = forked.start(output, *options, fault=forked.slow_to_notice)
    assert end(process) == 0, said(output)
    manifest_of(output)


@pytest.mark.parametrize("options", [(), ("--log", "rich"), ("--log", "json")], ids=str)
@pytest.mark.parametrize("fault", [forked.reader_gone, forked.full_output], ids=lambda fault: fault.__name__)
def test_a_log_that_cannot_be_written_costs_nothing(
    fault: Callable[[], None], options: tuple[str, ...], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert end(forked.start(output, "--max-ipc", "2", *options, fault=fault)) == 0, said(output)
    assert any("the log could not be written to its end" in warning for warning in manifest_of(output)["warnings"])
    assert "Traceback" not in said(output)


def test_a_job_that_nobody_listens_to_is_gone_at_its_deadline(tmp_path: Path) -> None:
    output, began = tmp_path / "out", time.time()
    options = (*NO_CAP, "--budget", "4s", "--started-at", str(began))
    process = forked.start(output, *options, fault=forked.nobody_listens)
    assert end(process) == 3 and time.time() - began < 4, "the first line it prints is never taken"


def test_a_device_that_fails_leaves_what_was_done(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert end(forked.start(output, *NO_CAP, device=forked.failing_device)) == 0
    manifest = manifest_of(output)
    assert manifest["rounds"] >= forked.FAULT_AFTER and any(
        "illegal memory access" in warning for warning in manifest["warnings"]
    )


def test_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert end(forked.start(output, "--max-ipc", "3", "--batch-size", "40", device=forked.little_memory)) == 0
    manifest = manifest_of(output)
    assert manifest["batch_size"] == 10 and manifest["rounds"] == 3
    assert [warning for warning in manifest["warnings"] if "out of memory" in warning] == [
        "out of memory: batches of 20 from now on",
        "out of memory: batches of 10 from now on",
    ]


def test_a_full_disk_keeps_the_last_file(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert end(forked.start(output, *NO_CAP, fault=forked.small_files)) == 5
    check_file(output)
    assert "MB are needed there" in said(output)
    assert not list(output.glob("*.unfinished"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_someone_else_fills_keeps_the_last_file(small_disk: Path) -> None:
    output = small_disk / "out"
    process = start_and_wait(output, *NO_CAP, "--aug-per-image", "0", device=forked.unhurried_device)
    with (small_disk / "someone_elses").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    assert end(process) == 5
    assert re.search(r"error: cannot write .*No space left on device.* MB", said(output))
    check_file(output)


def test_a_small_disk_bounds_the_file(small_disk: Path) -> None:
    output = small_disk / "out"
    assert end(forked.start(output, *NO_CAP, "--aug-per-image", "0")) == 0, said(output)
    manifest = manifest_of(output)
    assert 10 <= manifest["ipc"] == manifest["rounds"] < 40e6 / (100 * 3 * 32 * 32 * 4)
    assert any("no room" in warning for warning in manifest["warnings"])
    assert manifest["idle_time"] is None, "no more would have fitted"


def test_a_clock_that_is_set_changes_nothing(tmp_path: Path) -> None:
    output, began = tmp_path / "out", time.monotonic()
    options = (*NO_CAP, *AT_ONCE, "--aug-per-image", "0", "--budget", "10s")
    assert end(forked.start(output, *options, fault=forked.jumping_clock)) == 0, said(output)
    assert 4 < manifest_of(output)["elapsed_seconds"] <= time.monotonic() - began, "neither hour nor day was counted"


def test_a_removed_output_folder_is_made_anew(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start_and_wait(output, "--max-ipc", "6")
    shutil.rmtree(output)
    assert end(process) == 0
    assert any("was removed" in warning for warning in manifest_of(output)["warnings"])


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that anyone may write to; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_an_output_folder_that_turns_read_only_is_code_5(shared_folder: Path) -> None:
    output = shared_folder / "out"
    process = start_and_wait(output, *NO_CAP, fault=forked.ordinary_user)
    output.chmod(0o555)
    try:
        assert end(process) == 5
        assert "Permission denied" in said(output)
        check_file(output)
    finally:
        output.chmod(0o755)


def test_a_job_that_stands_back_has_its_snapshots_too(shared_folder: Path) -> None:
    process = start_and_wait(shared_folder / "out", *NO_CAP, fault=forked.ordinary_user_who_stands_back)
    kill(process, signal.SIGKILL)
    end(process)
    assert "Permission" not in said(shared_folder / "out")


def test_a_second_job_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = start_and_wait(output, *NO_CAP)
    second = forked.start(output, "--max-ipc", "1")
    assert end(second) == 5 and "another job is writing to" in said(output)
    assert first.is_alive()
    kill(first, signal.SIGTERM)
    assert end(first) == 0
    manifest_of(output)


def test_a_stopped_process_plans_anew(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start_and_wait(output, *NO_CAP, "--batch-size", "20")
    time.sleep(0.3)
    kill(process, signal.SIGSTOP)
    time.sleep(4)  # several times what a batch takes on a busy machine too
    kill(process, signal.SIGCONT)
    forked.wait_for(lambda: "were expected" in said(output), process)
    kill(process, signal.SIGTERM)
    assert end(process) == 0
    assert any("were expected" in warning for warning in manifest_of(output)["warnings"])


def test_an_interrupted_job_is_resumed_and_a_torn_round_made_again(tmp_path: Path) -> None:
    output, options = tmp_path / "out", ("--aug-per-image", "0")
    process = start_and_wait(output, *options, *NO_CAP)
    time.sleep(0.5)
    kill(process, signal.SIGKILL)
    end(process)
    spool = output / ".cifar100.spool/rounds.u8"
    with spool.open("ab") as file:
        file.write(b"a part of a round")
    whole = spool.stat().st_size // (100 * 3 * 32 * 32)
    with spool.open("r+b") as file:
        file.seek((whole - 1) * (100 * 3 * 32 * 32 + 8) + 1000)
        file.write(b"torn")
    ipc = str(whole + 2)
    assert end(forked.start(output, "--resume", "--seed", "1", "--max-ipc", ipc)) == 2
    assert "seed was 0 and is now 1" in said(output)
    assert end(forked.start(output, *options, "--resume", "--max-ipc", ipc)) == 0
    assert manifest_of(output)["resumed_rounds"] == whole - 1
    assert end(forked.start(tmp_path / "other", *options, "--max-ipc", ipc)) == 0
    difference = (check_file(output) - check_file(tmp_path / "other")).abs().max() * max(TASK.std)
    assert difference < 1.5 / 255
    assert {path.name for path in output.iterdir()} == {f"cifar100.{kind}" for kind in ("html", "json", "png", "pt")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_images_are_chosen_a_file_is_there_and_a_resumed_run_chooses(
    tmp_path: Path, number: signal.Signals
) -> None:
    output, options = tmp_path / "out", ("--max-ipc", "2", *POOL, "12", "--aug-per-image", "0", *AT_ONCE)
    process = start_and_wait(output, *options, fault=forked.slow_to_choose)
    forked.wait_for(lambda: "choosing" in said(output), process)
    time.sleep(0.5)
    kill(process, number)
    assert end(process, GRACE) == (0 if number == signal.SIGTERM else -number)
    check_file(output)
    assert manifest_of(output)["ipc"] == 2
    assert end(forked.start(output, *options, "--resume")) == 0
    assert manifest_of(output)["resumed_rounds"] == manifest_of(output)["pool"] == 12
    assert end(forked.start(tmp_path / "other", *options)) == 0
    difference = (check_file(output) - check_file(tmp_path / "other")).abs().max() * max(TASK.std)
    assert difference < 1.5 / 255


def test_where_choosing_does_not_come_back_the_first_images_are_in_the_file(tmp_path: Path) -> None:
    output, options = tmp_path / "out", ("--max-ipc", "2", *POOL, "6", "--budget", "8s", *AT_ONCE)
    process = start_and_wait(output, *options, fault=forked.endless_choosing)
    assert end(process, 10) == 0, said(output)
    check_file(output)
    manifest = manifest_of(output)
    assert manifest["ipc"] == 2 and manifest["pool"] is None and manifest["elapsed_seconds"] < 8
    assert any("does not come back" in warning for warning in manifest["warnings"])


def test_a_report_that_takes_too_long_is_left_undone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start_and_wait(output, "--max-ipc", "2", fault=forked.endless_report)
    forked.wait_for(lambda: not (output / ".cifar100.spool").exists(), process)
    kill(process, signal.SIGTERM)
    assert end(process, GRACE) == 0, said(output)
    assert manifest_of(output)["ipc"] == 2 and not (output / "cifar100.html").exists()
    assert "no time for the report: ./run.sh report" in said(output)
    assert {path.name for path in output.iterdir()} == {"cifar100.pt", "cifar100.json", "cifar100.png"}
    assert end(forked.start(output, "--max-ipc", "1")) == 0, "nobody is kept out of the folder"
    assert manifest_of(output)["warnings"] == []


def test_what_a_killed_job_left_is_cleared_away_and_said(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start_and_wait(output, *NO_CAP)
    kill(process, signal.SIGKILL)
    end(process)
    (output / ".cifar100.pt.123.unfinished").write_text("half a file")
    assert end(forked.start(output, "--max-ipc", "1")) == 0
    assert any("of an interrupted run removed" in warning for warning in manifest_of(output)["warnings"])
    assert {path.name for path in output.iterdir()} == {f"cifar100.{kind}" for kind in ("html", "json", "png", "pt")}


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Rounds are put into the spool of an interrupted job: what is left to do is reading them and writing the file.

    The same job took up to 170 MB more at one time than at another, by what of it happens at once. So many rounds are
    added that even half of their bytes, held in memory, would be more.
    """
    peaks, few, many, a_round = {}, 50, 1500, 100 * 3 * 32 * 32
    for ipc in (few, many):
        output = tmp_path / str(ipc)
        process = start_and_wait(output, *NO_CAP)
        kill(process, signal.SIGKILL)
        end(process)
        with Spool(output / ".cifar100.spool", 100, 32) as spool:
            dice = np.random.default_rng(0)
            for number in range(spool.count, ipc - 1):
                spool.append(dice.integers(0, 256, spool.shape, dtype=np.uint8), number)
        # One size of batch: the search ends at another every time, and each takes its own memory.
        options = ("--max-ipc", str(ipc), "--aug-per-image", "0", "--batch-size", "50", "--dtype", "float16")
        assert end(forked.start(output, "--resume", *options)) == 0
        manifest = json.loads((output / "cifar100.json").read_text())  # the file is noise, and large: nobody audits it
        assert manifest["ipc"] == manifest["rounds"] == ipc
        peaks[ipc] = manifest["peak_memory_bytes"]
    assert peaks[many] - peaks[few] < (many - few) * a_round / 2, peaks

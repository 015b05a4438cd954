"""Several devices through Ray: what they make, and what becomes of it when one of them does not. Really killed.

Most devices are made up (`tests/stub_device.py`); Ray, its actors and nodes, and the job are the real ones.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from submission.tasks import load_task
from tests import forked, stub_device
from tests.conftest import TINY_TASK
from tests.forked import end, said
from tests.paths import ROOT
from tools.scoring.findings import audit

TASK = load_task("cifar100")
# A round in one go, and no copies: as many images per class as rounds.
AT_ONCE = ("--aug-per-image", "0", "--batch-size", "100")
# Not to be reached, and few rounds a second: what is tested is not how fast files are written.
BATCH = 25
ENDLESS = ("--aug-per-image", "0", "--max-ipc", "100000", "--batch-size", str(BATCH))
ACTOR = "ray::Actor"
GRACE = 8.0


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    forked.warm_up()


def below(pid: int | None) -> list[psutil.Process]:
    """What it has started, and what that has."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def actors(pid: int | None) -> list[psutil.Process]:
    found = []
    for process in below(pid):
        with suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith(ACTOR):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def start(output: Path, *options: str, rounds: int = 1, fault: Callable[[], None] | None = None) -> ForkServerProcess:
    """A job of several devices that has made so many rounds, the first file in place."""
    process = forked.start(output, *options, device=forked.stubs, fault=fault)
    stride = 100 * 3 * 32 * 32 + 8

    def at_work() -> bool:
        spool = output / ".cifar100.spool/rounds.u8"
        there = (output / "cifar100.pt").exists() and spool.exists()
        return there and spool.stat().st_size >= rounds * stride

    forked.wait_for(at_work, process)
    assert process.is_alive(), said(output)
    return process


def images_of(output: Path) -> Tensor:
    images: Tensor = torch.load(output / "cifar100.pt", weights_only=True)
    return images


def check(output: Path, *, stubs: bool = True) -> dict[str, Any]:
    """The manifest of a file that passes the audit, whose rounds are the first ones, none missing."""
    manifest: dict[str, Any] = json.loads((output / "cifar100.json").read_text())
    assert [finding.text for finding in audit(output / "cifar100.pt", TASK) if finding.fatal] == []
    images = images_of(output)
    assert len(images) == 100 * manifest["ipc"] and manifest["ipc"] == manifest["rounds"]
    if stubs:
        mean, std = torch.tensor(TASK.mean).view(3, 1, 1), torch.tensor(TASK.std).view(3, 1, 1)
        pixels = ((images.unflatten(0, (100, -1)) * std + mean) * 255).round()  # type: ignore[no-untyped-call]
        for number in (0, 99, 100 * (manifest["rounds"] - 1) + 7):
            expected = torch.from_numpy(stub_device.picture(number)).float()
            assert torch.equal(pixels[number % 100, number // 100], expected)
    return manifest


def test_two_devices_make_the_file_that_one_makes(tmp_path: Path) -> None:
    options = ("--max-ipc", "13", "--aug-per-image", "2", "--batch-size", "100")
    assert end(forked.start(tmp_path / "1", *options)) == 0
    # As without run.sh, which says where the code is.
    process = forked.start(tmp_path / "2", *options, "--devices", "cpu:2", environment={"PYTHONPATH": ""})
    seen: list[psutil.Process] = []
    while process.is_alive():
        seen += [child for child in below(process.pid) if child not in seen]
        process.join(0.1)
    assert process.exitcode == 0 and "warning" not in said(tmp_path / "2"), said(tmp_path / "2")
    assert len(seen) > 2 and not alive(seen), "nothing of Ray is left"
    assert torch.equal(*(images_of(tmp_path / name) for name in "12"))
    manifest = json.loads((tmp_path / "2" / "cifar100.json").read_text())
    assert sum(device["images"] for device in manifest["devices"]) == 1300 and len(manifest["devices"]) == 2
    assert min(device["images"] for device in manifest["devices"]) >= 100, manifest["devices"]
    assert "start Ray" in manifest["phases_seconds"] and "ray" in manifest["versions"]
    names = {path.name for path in (tmp_path / "2").iterdir()}
    assert names == {f"cifar100.{kind}" for kind in ("html", "json", "png", "pt")}


def test_every_task_of_a_run_has_all_devices(tmp_path: Path) -> None:
    """Ray is started anew for the second, and nothing of either is left."""
    output, other = tmp_path / "out", tmp_path / "tiny.toml"
    other.write_text(TINY_TASK.replace("size = 16", "size = 32"))  # as large as what the stubs make
    options, tasks = ("--devices", "cpu:2", "--max-ipc", "6", *AT_ONCE), ("cifar100", str(other))
    seen: list[psutil.Process] = []
    with tempfile.TemporaryDirectory() as temporary:  # whose path is short enough for Ray's sockets
        process = forked.start(output, *options, tasks=tasks, device=forked.stubs, environment={"TMPDIR": temporary})
        while process.is_alive():
            seen += [child for child in below(process.pid) if child not in seen]
            process.join(0.1)
        assert process.exitcode == 0, said(output)
        assert not alive(seen) and not list(Path(temporary).iterdir())
    check(output)
    devices = json.loads((output / "tiny.json").read_text())["devices"]
    assert len(devices) == 2 and sum(device["images"] for device in devices) == 18


def test_a_killed_and_a_stopped_device_cost_what_they_had_in_hand(tmp_path: Path) -> None:
    """The second is stopped for good: its images go to the other, and in time it is ended."""
    output, began, budget = tmp_path / "out", time.time(), 45
    options = ("--devices", "cpu:3", "--budget", f"{budget}s", "--started-at", str(began))
    process = start(output, *ENDLESS, *options, rounds=6)
    first, second, _ = actors(process.pid)
    os.kill(second.pid, signal.SIGSTOP)
    os.kill(first.pid, signal.SIGKILL)
    seen = below(process.pid)
    assert end(process) == 0 and time.time() - began < budget, said(output)
    assert not alive(seen), "nothing of Ray is left"
    manifest = check(output)
    warnings = [warning for warning in manifest["warnings"] if "in hand go to others" in warning]
    assert any("is started anew" in warning for warning in warnings), said(output)
    assert any("no answer for" in warning for warning in warnings), said(output)
    assert sorted(device["restarts"] > 0 for device in manifest["devices"]) == [False, True, True]
    made = sum(device["images"] for device in manifest["devices"])
    assert 100 * (manifest["rounds"] + 1) > made - 2 * 3 * BATCH, "no more than what was in hand is lost"


def test_a_driver_told_to_stop_finishes_the_file_and_another_number_of_devices_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(output, *ENDLESS, "--devices", "cpu:2", rounds=4)
    seen, told = below(process.pid), time.monotonic()
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)
    assert end(process, GRACE) == 0 and time.monotonic() - told < GRACE, said(output)
    assert not alive(seen), "nothing of Ray is left"
    rounds = check(output)["rounds"]
    options = (*AT_ONCE, "--max-ipc", str(rounds + 20), "--resume", "--devices", "cpu:3")
    assert end(forked.start(output, *options, device=forked.stubs, environment={"STUB_MOST": "50"})) == 0, said(output)
    manifest = check(output)
    assert manifest["rounds"] == rounds + 20 and manifest["resumed_rounds"] >= rounds
    warned = {warning for warning in manifest["warnings"] if "devices share" not in warning}
    assert warned == {"out of memory: batches of 50 from now on"}
    assert min(device["images"] for device in manifest["devices"]) > 0, "all of them, in one manner"


def test_a_driver_told_to_stop_has_longer_than_ray_would_give_it(tmp_path: Path) -> None:
    """Its handler of SIGTERM would abort the process after three seconds."""
    output = tmp_path / "out"
    process = start(output, *ENDLESS, "--devices", "cpu:2", rounds=4, fault=forked.endless_report)
    forked.kill(process, signal.SIGTERM)
    assert end(process, GRACE) == 0, said(output)
    assert "no time for the report" in said(output) and "SIGTERM received" not in said(output)


def test_a_killed_driver_leaves_its_file_and_nothing_of_ray(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(output, *ENDLESS, "--devices", "cpu:2", rounds=4)
    seen = below(process.pid)
    assert process.pid and len(actors(process.pid)) == 2
    os.kill(process.pid, signal.SIGKILL)
    killed = time.monotonic()
    end(process)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    while alive(seen) and time.monotonic() - killed < 20:
        time.sleep(0.05)
    took = time.monotonic() - killed
    assert took < 10, [child.name() for child in alive(seen)]
    print(f"nothing of Ray is left after {took:.1f} s")
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}, "nobody touches the output"
    check(output)


@pytest.mark.long
def test_a_ray_that_dies_ends_generation_and_not_the_job(tmp_path: Path) -> None:
    """All of it, as when Slurm tells every process of a step to go: the file is finished with what there is."""
    output = tmp_path / "out"
    process = start(output, *ENDLESS, "--devices", "cpu:2", "--budget", "60s", rounds=4)
    for child in below(process.pid):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    assert end(process, 30) == 0, said(output)
    assert any("is left out" in warning for warning in check(output)["warnings"])


class Nodes:
    """A cluster of Ray on this machine, on whose nodes these folders are not to be seen."""

    def __init__(self, *hidden: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_cluster", *map(str, hidden)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.address = self.process.stdout.readline().strip()

    def tell(self, word: str) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def end(self) -> None:
        children = below(self.process.pid)
        self.process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    yield cluster
    cluster.end()


def on_cluster(nodes: Nodes, devices: int) -> tuple[str, ...]:
    return "--cluster", nodes.address, "--devices", str(devices)


def test_nodes_come_and_go(nodes: Nodes, tmp_path: Path) -> None:
    """Of three devices two find a place, and the third when a node joins. Then one leaves."""
    output, began, budget = tmp_path / "out", time.time(), 35
    options = (*ENDLESS, *on_cluster(nodes, 3), "--budget", f"{budget}s", "--started-at", str(began))
    process = start(output, *options, rounds=4)
    assert said(output).count("is ready") == 2, said(output)
    nodes.tell("add")
    forked.wait_for(lambda: said(output).count("is ready") == 3, process)
    time.sleep(1)
    nodes.tell("remove")
    assert end(process) == 0 and time.time() - began < budget, said(output)
    ended = time.monotonic()
    while actors(nodes.process.pid):
        assert time.monotonic() - ended < 10, "the job's actors go with it"
    manifest = check(output)
    assert len(manifest["devices"]) == 3 and min(device["images"] for device in manifest["devices"]) > 0
    assert sum("in hand go to others" in warning for warning in manifest["warnings"]) == 1
    made = sum(device["images"] for device in manifest["devices"])
    assert 100 * (manifest["rounds"] + 1) > made - 2 * 3 * BATCH, "no more than what was in hand is lost"


def test_every_task_of_a_run_has_the_cluster(nodes: Nodes, tmp_path: Path) -> None:
    output, other = tmp_path / "out", tmp_path / "tiny.toml"
    other.write_text(TINY_TASK.replace("size = 16", "size = 32"))
    options, tasks = ("--max-ipc", "3", *AT_ONCE, *on_cluster(nodes, 2)), ("cifar100", str(other))
    assert end(forked.start(output, *options, tasks=tasks, device=forked.stubs)) == 0, said(output)
    check(output)
    assert json.loads((output / "tiny.json").read_text())["rounds"] == 3


def test_a_checkpoint_that_no_node_sees_is_said_with_the_node(nodes: Nodes, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = (*AT_ONCE, *on_cluster(nodes, 2))
    assert end(forked.start(output, *options, device=forked.stubs_that_do_not_load)) == 4, said(output)
    assert f"error: on node {os.uname().nodename}: /weights/unet is missing" in said(output)
    assert not list(output.glob("*"))


def test_what_a_cluster_lacks_is_said(nodes: Nodes, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert end(forked.start(output, "--cluster", nodes.address)) == 2
    assert "has no GPU: --devices says how many" in said(output).splitlines()[-1]
    assert end(forked.start(output, "--cluster", "127.0.0.1:1", "--devices", "2")) == 2
    assert "--cluster 127.0.0.1:1: Ray does not start or answer ([Errno 111]" in said(output).splitlines()[-1]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give nodes a view of the disk of their own")
def test_a_cluster_that_sees_neither_the_output_nor_the_code_makes_the_same_file(tmp_path: Path) -> None:
    """The code and the embedded checkpoint travel; images come back through Ray alone."""
    (tmp_path / "hidden").mkdir()
    options = ("--max-ipc", "13", *AT_ONCE)
    assert end(forked.start(tmp_path / "1", *options)) == 0
    cluster = Nodes(tmp_path / "hidden", ROOT / "submission")
    try:
        inside = Path(f"/proc/{cluster.process.pid}/root")
        assert not list((inside / "submission").glob("*"))
        output = tmp_path / "hidden" / "2"
        process = forked.start(output, *options, *on_cluster(cluster, 2))
        forked.wait_for(lambda: len(actors(cluster.process.pid)) == 2, process)
        for actor in actors(cluster.process.pid):
            there = Path(f"/proc/{actor.pid}/root{tmp_path}/hidden")
            assert actor.cwd() != str(Path.cwd()) and not list(there.iterdir())
            with pytest.raises(OSError, match="Read-only"):
                (there / "file").write_text("")
        assert end(process) == 0, said(output)
        assert torch.equal(images_of(tmp_path / "1"), images_of(output))
    finally:
        cluster.end()


@pytest.mark.long
def test_sixty_four_devices_lose_no_time_to_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On devices that are made up; everything else is the real job, on fewer cores than there are devices.

    What counts is from when the last of them has begun: until then, the cores are at starting the others.
    """
    output, times = tmp_path / "out", tmp_path / "times"
    times.mkdir()
    options = ("--aug-per-image", "0", "--max-ipc", "100000", "--batch-size", "10", "--budget", "120s")
    told = {"STUB_TIMES": str(times), "STUB_SECONDS": "0.8"}
    process = forked.start(output, *options, "--devices", "cpu:64", device=forked.stubs, environment=told)
    assert end(process, 130) == 0, said(output)
    manifest = check(output)
    assert len(manifest["devices"]) == 64 and min(device["images"] for device in manifest["devices"]) > 0
    batches = [np.loadtxt(file, ndmin=2) for file in times.iterdir()]  # began, ended
    begin, until = max(device[0, 1] for device in batches), min(device[-1, 0] for device in batches)
    within = [np.clip(device, begin, until) for device in batches]
    lost = [1 - (device[:, 1] - device[:, 0]).sum() / (until - begin) for device in within]
    print(
        f"{until - begin:.0f} s of all 64; lost between batches: {np.mean(lost):.2%}, at most {max(lost):.2%}; "
        f"Ray started in {manifest['phases_seconds']['start Ray']:.1f} s"
    )
    assert until - begin > 20 and np.mean(lost) < 0.03


def test_modules_in_the_folder_it_is_started_from_are_not_taken_for_ours(tmp_path: Path) -> None:
    """Ray has its workers look for modules there, before anywhere else."""
    for name in ("submission.py", "random.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')\n")
    command = [
        str(ROOT / "run.sh"),
        "cifar100",
        "--model",
        "embedded",
        *AT_ONCE,
        "--max-ipc",
        "1",
        "--select",
        "none",
        "--devices",
        "cpu:2",
    ]
    environment = os.environ | {"BANKO_PYTHON": sys.executable}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, ""), process.stdout
    assert len(images_of(tmp_path / "outputs")) == 100

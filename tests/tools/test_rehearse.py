"""The rehearsal, with stand-ins for the job that do what jobs must not do."""

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY_TASK
from tools import rehearse


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script to be run in place of the job, which leaves a good file."""
    (tmp_path / "tiny.toml").write_text(TINY_TASK)
    pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    torch.save((pixels - mean) / std, tmp_path / "good.pt")
    script = tmp_path / "run.sh"
    monkeypatch.setattr(rehearse, "RUN", script)
    monkeypatch.setenv("BANKO_STARTED_AT", "1")
    return script


def write(script: Path, *lines: str) -> None:
    script.write_text("\n".join(["#!/bin/bash", "set -e", f'cd "{script.parent}"', "mkdir -p out", *lines]) + "\n")
    script.chmod(0o755)


def run(
    script: Path,
    capsys: pytest.CaptureFixture[str],
    *options: str,
    limit: str = "20",
    tasks: Sequence[str] = ("tiny",),
) -> tuple[int, str]:
    folder = script.parent
    names = [str(folder / f"{task}.toml") for task in tasks]
    arguments = [*names, "--limit", limit, "--output", str(folder / "out"), "--seed", "3", "--select", "none", *options]
    code = rehearse.main(arguments)
    return code, capsys.readouterr().out


GOOD = (
    "cp good.pt out/tiny.pt",
    """echo '{"ipc": 2, "rounds": 1, "warnings": ["no time for more"]}' > out/tiny.json""",
)


def test_a_good_job_passes_with_its_margin(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(job, *GOOD, 'echo "$@" > arguments', "echo ${BANKO_STARTED_AT-unset} > started")
    code, out = run(job, capsys)
    assert code == 0 and "pass: tiny, IPC 2 (1 rounds), gone after" in out and "of 20" in out
    assert "warning of the job: no time for more" in out
    arguments = (job.parent / "arguments").read_text()
    assert "--budget 20s" in arguments and "--seed 3" in arguments
    assert (job.parent / "started").read_text() == "unset\n"


def test_a_job_over_the_limit_is_killed_with_all_its_processes(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(job, *GOOD, "sleep 100 & echo $! > child", "wait")
    began = time.monotonic()
    code, out = run(job, capsys, limit="1")
    assert code == 6 and "killed at the limit of 1 s" in out and time.monotonic() - began < 50
    child = int((job.parent / "child").read_text())
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_when_it_is_ended_so_is_the_job(job: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    write(job, "sleep 100 & echo $! > child", f"kill -{number.value} {os.getpid()}", "wait")
    ours = signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored
    code, _ = run(job, capsys)
    assert code == 130
    assert signal.signal(number, ours) == signal.SIG_DFL
    child = int((job.parent / "child").read_text())
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((), "does not exist"),
        ((*GOOD, "exit 3"), "exit code 3"),
        ((*GOOD, "head -c 5000 good.pt > out/tiny.pt"), "not a whole file"),
        (("cp -p old.pt out/tiny.pt",), "older than this run"),
        ((GOOD[0],), "tiny.json does not exist"),
        ((*GOOD, "cp flat.pt out/tiny.pt"), "tiny.pt: "),
    ],
)
def test_what_is_wrong_is_a_fault(
    job: Path, capsys: pytest.CaptureFixture[str], lines: tuple[str, ...], words: str
) -> None:
    shutil.copy(job.parent / "good.pt", job.parent / "old.pt")
    os.utime(job.parent / "old.pt", (1e9, 1e9))
    torch.save(torch.zeros(6, 3, 16, 16), job.parent / "flat.pt")
    write(job, *lines)
    code, out = run(job, capsys)
    assert code == 6 and words in out and "fail: tiny" in out


OTHER = ("cp good.pt out/other.pt", """echo '{"ipc": 2, "rounds": 2, "warnings": []}' > out/other.json""")
BOTH = ("tiny", "other")


@pytest.fixture
def job_of_two(job: Path) -> Path:
    (job.parent / "other.toml").write_text(TINY_TASK.replace('"tiny"', '"other"'))
    return job


def test_several_tasks_share_the_limit_and_all_files_are_judged(
    job_of_two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(job_of_two, *GOOD, *OTHER, 'echo "$@" > arguments')
    code, out = run(job_of_two, capsys, tasks=BOTH)
    assert code == 0 and "pass: tiny, IPC 2 (1 rounds)" in out and "pass: other, IPC 2 (2 rounds)" in out
    arguments = (job_of_two.parent / "arguments").read_text()
    assert "--total 20s" in arguments and "--budget" not in arguments and "tiny.toml" in arguments


def test_options_of_the_job_may_stand_before_its_task(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(job, *GOOD)
    task = str(job.parent / "tiny.toml")
    assert rehearse.main(["--model", "embedded", "--output", str(job.parent / "out"), task]) == 0
    assert "pass: tiny" in capsys.readouterr().out


def test_a_budget_of_one_s_own_is_the_job_s(job_of_two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(job_of_two, *GOOD, *OTHER, 'echo "$@" > arguments')
    code, _ = run(job_of_two, capsys, "--budget", "5s", tasks=BOTH)
    arguments = (job_of_two.parent / "arguments").read_text()
    assert code == 0 and "--budget 5s" in arguments and "--total" not in arguments


def test_a_word_that_the_job_does_not_know_is_refused_before_it_starts(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(job, "touch started")
    with pytest.raises(SystemExit) as refusal:
        rehearse.main(["cifar100", "--modle", "embedded"])
    assert refusal.value.code == 2 and "--modle" in capsys.readouterr().err
    assert not (job.parent / "started").exists()


@pytest.mark.parametrize(
    ("lines", "passes"),
    [
        ((*GOOD, "exit 3"), {"tiny"}),
        ((*GOOD, *OTHER, "exit 3"), set()),
        ((*GOOD, *OTHER, "sleep 100"), set()),
        ((*OTHER, "cp flat.pt out/tiny.pt", "cp out/other.json out/tiny.json"), {"other"}),
    ],
    ids=["one is missing", "a code without a reason", "killed", "one is bad"],
)
def test_one_bad_file_of_several_is_a_failure(
    job_of_two: Path, capsys: pytest.CaptureFixture[str], lines: tuple[str, ...], passes: set[str]
) -> None:
    torch.save(torch.zeros(6, 3, 16, 16), job_of_two.parent / "flat.pt")
    write(job_of_two, *lines)
    code, out = run(job_of_two, capsys, tasks=BOTH, limit="2")
    assert code == 6
    assert {name for name in BOTH if f"pass: {name}" in out} == passes
    assert {name for name in BOTH if f"fail: {name}" in out} == set(BOTH) - passes


def test_a_job_that_is_resumed_may_leave_a_file_as_it_is(job_of_two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(job_of_two, *GOOD)
    assert run(job_of_two, capsys)[0] == 0
    write(job_of_two, *OTHER)
    assert run(job_of_two, capsys, tasks=BOTH)[0] == 6
    code, out = run(job_of_two, capsys, "--resume", tasks=BOTH)
    assert code == 0 and "pass: tiny" in out and "pass: other" in out

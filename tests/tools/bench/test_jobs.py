"""A job that a measurement waits for, with stand-ins for it."""

import os
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from submission.errors import InputFileError
from tools.bench import jobs

FILE = """echo '{"rounds": 3}' > "${@: -1}/cifar100.json\""""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Is run in place of the job."""
    script = tmp_path / "run.sh"
    monkeypatch.setattr(jobs, "RUN", script)
    return script


def write(script: Path, *lines: str) -> None:
    script.write_text("\n".join(["#!/bin/bash", f'cd "{script.parent}"', *lines]) + "\n")
    script.chmod(0o755)


def test_it_has_the_environment_of_its_own(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANKO_STARTED_AT", "1")
    write(script, FILE, 'echo "$@" > said', "echo ${BANKO_STARTED_AT-unset} $OMP_NUM_THREADS > environment")
    assert jobs.run_job("cifar100", ["--budget", "9s"], OMP_NUM_THREADS="1") == {"rounds": 3}
    assert (script.parent / "environment").read_text() == "unset 1\n"
    words = (script.parent / "said").read_text().split()
    assert words[:4] == ["cifar100", "--budget", "9s", "--output"] and not Path(words[4]).exists()


def test_it_is_kept_to_cores(script: Path) -> None:
    core = min(os.sched_getaffinity(0))
    write(script, """echo "{\\"cores\\": \\"$(taskset -cp $$ | sed 's/.* //')\\"}" > "${@: -1}/cifar100.json\"""")
    assert jobs.run_job("cifar100", [], [core]) == {"cores": str(core)}


def test_none_where_the_budget_holds_no_round(script: Path) -> None:
    write(script, "exit 3")
    assert jobs.run_job("cifar100", []) is None


def test_one_that_fails_is_told_of(script: Path) -> None:
    write(script, "echo error: no such model >&2", "exit 4")
    with pytest.raises(InputFileError, match=r"run.sh cifar100 --model x ended with exit code 4: error: no such model"):
        jobs.run_job("cifar100", ["--model", "x"])


def test_when_the_measurement_is_ended_so_is_the_job(script: Path) -> None:
    write(script, "echo $$ > job", "sleep 1", f"kill -TERM {os.getpid()}", "exec sleep 100")
    with pytest.raises(KeyboardInterrupt):
        jobs.run_job("cifar100", [])
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((script.parent / "job").read_text())).wait(30)  # an error where it goes on


def test_its_manifest_is_what_the_real_one_writes(task_file: Path, checkpoint_folder: Path) -> None:
    options = ["--budget", "60s", "--max-ipc", "2", "--select", "none", "--device", "cpu"]
    manifest = jobs.run_job(str(task_file), [*options, "--model", str(checkpoint_folder)])
    assert manifest is not None and manifest["ipc"] == 2

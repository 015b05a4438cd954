"""The folder a job writes to, and the one where libraries keep their temporary files."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from submission import cli
from submission.machine import disk
from tests.paths import ROOT

ROOT_MOUNT = "22 1 0:20 / / rw - overlay overlay rw"


def test_what_is_no_file_is_written_into() -> None:
    disk.write_whole(Path("/dev/null"), b"nothing")
    assert Path("/dev/null").is_char_device()
    reader, writer = os.pipe()
    disk.write_whole(Path(f"/dev/fd/{writer}"), b"something")
    assert os.read(reader, 100) == b"something"
    os.close(reader)
    os.close(writer)


def test_standard_output_in_a_file_is_written_on(tmp_path: Path) -> None:
    program = """
from pathlib import Path
from submission.machine.disk import write_whole
print("before")
write_whole(Path("/dev/stdout"), b"content\\n")
print("after")
"""
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=log, check=True)
    assert (tmp_path / "log").read_text().split() == ["before", "content", "after"]


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel says is mounted, for a process in a container."""
    monkeypatch.setenv("BANKO_CONTAINER", "1")
    monkeypatch.setattr(disk, "MOUNTS", tmp_path / "mountinfo")
    return tmp_path / "mountinfo"


@pytest.mark.parametrize(
    ("mounted", "folder", "goes"),
    [
        ("/outputs", "/outputs", False),
        ("/outputs", "/outputs/of/today", False),
        ("/outputs", "/outputs2", True),
        ("/outputs", "/outputs/../elsewhere", True),
        (r"/my\040outputs", "/my outputs", False),
        ("/proc", "/outputs", True),
    ],
)
def test_files_go_with_the_container_where_nothing_is_mounted(
    mounts: Path, mounted: str, folder: str, *, goes: bool
) -> None:
    mounts.write_text(f"{ROOT_MOUNT}\n23 22 8:1 /home/me/outputs {mounted} rw - ext4 /dev/sda1 rw\n")
    assert disk.goes_with_the_container(Path(folder)) == goes


def test_outside_a_container_nothing_goes(mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BANKO_CONTAINER")
    assert not disk.goes_with_the_container(Path("/outputs"))


def test_a_job_says_that_its_files_go_with_the_container(
    mounts: Path, checkpoint_folder: Path, task_file: Path, tmp_path: Path
) -> None:
    mounts.write_text(f"{ROOT_MOUNT}\n")
    options = ["--model", str(checkpoint_folder), "--max-ipc", "1", "--output", str(tmp_path / "out")]
    options += ["--select", "none"]
    assert cli.main([str(task_file), *options]) == 0
    (warning,) = json.loads((tmp_path / "out/tiny.json").read_text())["warnings"]
    assert f'docker run -v "$PWD/outputs:{tmp_path}/out" keeps them' in warning


def test_a_temporary_folder_that_was_a_task_s_own_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "the spool of the task before"))
    disk.offer_temporary(tmp_path)
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    disk.offer_temporary(other)
    assert tempfile.gettempdir() == str(tmp_path), "what is there stays"

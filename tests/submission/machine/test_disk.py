"""The folder where libraries keep their temporary files."""

import os
import tempfile
from pathlib import Path

import pytest

from submission.machine import disk


def test_a_temporary_folder_that_was_a_task_s_own_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "the spool of the task before"))
    disk.offer_temporary(tmp_path)
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    disk.offer_temporary(other)
    assert tempfile.gettempdir() == str(tmp_path), "what is there stays"

"""Real processes whose output nobody takes, or not in Unicode."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.paths import ROOT

JOB = [sys.executable, "-m", "submission", "--device", "cpu", "--max-ipc", "2", "--select", "none"]


def run(shell: str, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line with a redirection or a pipe behind it; the exit code is the command's."""
    command = f"{shlex.join(words)} {shell}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


@pytest.mark.parametrize("shell", [">&-", ">&- 2>&-", "2>&-", "<&-", "| head -1", "> /dev/full 2> /dev/full"])
def test_the_file_is_what_counts(shell: str, checkpoint_folder: Path, task_file: Path, tmp_path: Path) -> None:
    done = run(shell, tmp_path, *JOB, str(task_file), "--model", str(checkpoint_folder), "--output", "out")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert torch.load(tmp_path / "out/tiny.pt", weights_only=True).shape == (6, 3, 16, 16)
    warnings = json.loads((tmp_path / "out/tiny.json").read_text())["warnings"]
    assert bool(warnings) == (shell not in ("2>&-", "<&-")), warnings
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"tiny.{kind}" for kind in ("html", "json", "png", "pt")
    }


@pytest.mark.parametrize("style", ["plain", "rich", "json"])
def test_what_a_terminal_s_encoding_lacks_is_written_as_escapes(
    style: str, checkpoint_folder: Path, task_file: Path, tmp_path: Path
) -> None:
    task_file.write_text(task_file.read_text().replace('"Tiny"', '"Früchte 🍎"').replace("an apple", "a 🍎"), "utf-8")
    words = [str(task_file), "--model", str(checkpoint_folder), "--output", "out", "--log", style]
    done = run("", tmp_path, *JOB, *words, PYTHONIOENCODING="iso-8859-1", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "1f34e" in done.stdout or style == "json", "JSON has escapes of its own"


@pytest.mark.parametrize("shell", [">&-", "> /dev/full", "2>&-", "2> /dev/full", ">&- 2>&-"])
def test_a_tool_keeps_its_exit_code_and_an_error_its_own(shell: str, tmp_path: Path) -> None:
    torch.save(torch.rand(100, 3, 32, 32), tmp_path / "cifar100.pt")
    assert run(shell, tmp_path, sys.executable, "-m", "tools.audit", "cifar100.pt").returncode == 6, "not normalised"
    assert run(shell, tmp_path, sys.executable, "-m", "submission", "cifar10").returncode == 2
    assert run(shell, tmp_path, sys.executable, "-m", "submission", "--help").returncode == 0

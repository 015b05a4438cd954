"""Several processes train as one, on the CPU."""

import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT

# Each process has gradients of its own, and an opinion.
PROGRAM = """
import sys
import torch
from accelerate import PartialState
from tools.training import processes

PartialState(cpu=True)
own = processes.number()
first, second = torch.zeros(2, 2, requires_grad=True), torch.zeros(3, requires_grad=True)
(first.sum() * (own + 1) + second.sum() * 10 * own).backward()
processes.average_gradients([first, second])
assert processes.count() == 2 and processes.agreed(own) == 0 and processes.is_first() == (own == 0)
assert torch.equal(first.grad, torch.full((2, 2), 1.5)) and torch.equal(second.grad, torch.full((3,), 5.0))
with processes.first_before_others():
    with open(sys.argv[1], "a") as log:
        log.write(f"{own}")
processes.leave()
"""


def run_together(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The exit code and output of two processes with a program."""
    command = [sys.executable, "-c", program, *arguments]
    start = f"import sys; from tools.training.processes import run_together; sys.exit(run_together({command!r}, 2))"
    return subprocess.run([sys.executable, "-c", start], cwd=ROOT, capture_output=True, text=True, check=False)


def test_gradients_are_averaged_and_the_first_process_decides(tmp_path: Path) -> None:
    done = run_together(PROGRAM, str(tmp_path / "log"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text() == "01"


def test_what_fails_in_all_is_said_once() -> None:
    program = """
from tools.training import processes
processes.join(cpu=True)
with processes.the_first_speaks():
    raise FileNotFoundError("no images")
"""
    done = run_together(program)
    assert done.returncode == 1 and done.stderr.count("FileNotFoundError: no images") == 1, done.stderr


def test_where_one_fails_the_others_are_ended_and_its_code_is_told() -> None:
    done = run_together("import os, sys, time; int(os.environ['RANK']) and sys.exit(6); time.sleep(1000)")
    assert done.returncode == 6

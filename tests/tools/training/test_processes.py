"""Several processes train as one: with accelerate's own launcher, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT

# Each process has gradients of its own, and an opinion.
PROGRAM = """
import torch
from accelerate import PartialState

PartialState(cpu=True)
from tools.training import processes

own = processes.number()
first, second = torch.zeros(2, 2, requires_grad=True), torch.zeros(3, requires_grad=True)
(first.sum() * (own + 1) + second.sum() * 10 * own).backward()
processes.average_gradients([first, second])
assert processes.count() == 2 and processes.agreed(own) == 0 and processes.is_first() == (own == 0)
assert torch.equal(first.grad, torch.full((2, 2), 1.5)) and torch.equal(second.grad, torch.full((3,), 5.0))
print("agreed", flush=True)
"""


def test_gradients_are_averaged_and_the_first_process_decides(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(program)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    done = subprocess.run(launch, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("agreed") == 2, done.stderr

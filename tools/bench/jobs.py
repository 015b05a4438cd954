"""A job of its own, for a measurement to wait for."""

import json
import os
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from submission.arguments import interrupted_by_signals
from submission.errors import BudgetError, InputFileError
from submission.tasks import load_task
from tools import environment_of_run

RUN = Path(__file__).resolve().parents[2] / "run.sh"


def run_job(
    task: str, options: Sequence[str], cores: Collection[int] = (), **environment: str
) -> dict[str, Any] | None:
    """Runs the job on a task, kept to these CPU cores if any are given, and returns its manifest; None where its budget
    holds no round. What it makes is thrown away. Who ends this process ends the job.

    Raises InputFileError where it fails.
    """
    with tempfile.TemporaryDirectory() as folder, interrupted_by_signals():
        done = subprocess.run(
            [str(RUN), task, *options, "--output", folder],
            env=environment_of_run() | environment,
            preexec_fn=partial(os.sched_setaffinity, 0, cores) if cores else None,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == BudgetError.exit_code:
            return None
        if done.returncode:
            command = " ".join(["./run.sh", task, *options])
            said_last = "".join(done.stderr.splitlines()[-1:])
            raise InputFileError(f"{command} ended with exit code {done.returncode}: {said_last}")
        manifest: dict[str, Any] = json.loads((Path(folder) / f"{load_task(task).name}.json").read_bytes())
        return manifest

"""Runs the job as the organisers would: under a hard limit, from outside, with what is on disk at the end as judge.

    ./run.sh rehearse cifar100 --limit 600 --max-ipc 10000

The job gets a process group of its own and the limit as its budget; the clock starts before it does. At the limit the
whole group is killed. Then the file is audited.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission.arguments import Parser, exit_code_of, parse_seconds
from submission.errors import InputFileError
from submission.tasks import Task, load_task
from tools.scoring.findings import audit

RUN = Path(__file__).resolve().parents[1] / "run.sh"


@dataclass(frozen=True)
class Rehearsal:
    """How it went: seconds until the job was gone, None where it was killed, what was wrong, and the job's manifest,
    empty where there is none."""

    seconds: float | None
    faults: list[str]
    manifest: dict[str, Any]


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh rehearse",
        description="Runs the job in a process group of its own under a hard limit, kills it at the limit, audits what "
        "is on disk, and says pass or fail with the margin left. All other options go to the job.",
        epilog="example:\n  ./run.sh rehearse cifar100 --limit 10m --max-ipc 10000\n\n"
        "exit codes: 0 pass; 2 usage; 6 fail",
    )
    add = parser.add_argument
    add("task", metavar="TASK", help="the job's: a built-in one, or the path of a task's .toml")
    add("--limit", default="600", metavar="TIME", help="when the job is killed, and its --budget: 600, 90s or 10m")
    add("--output", type=Path, default=Path("outputs"), metavar="DIR", help="gets the job's files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options, passed_on = build_parser().parse_known_args(arguments)
    return exit_code_of(lambda: _judge(options, passed_on))


def _judge(options: argparse.Namespace, passed_on: Sequence[str]) -> int:
    limit, task = parse_seconds(options.limit, "--limit"), load_task(options.task)
    result = rehearse(options.task, task, limit, options.output, passed_on)
    # A file that is whole may still hold less than was made: the job's own warnings say so.
    for warning in result.manifest.get("warnings", []):
        print(f"warning of the job: {warning}")
    for fault in result.faults:
        print(f"fault: {fault}")
    if result.faults or result.seconds is None:
        print(f"fail: {task.name} under a limit of {limit:g} s")
        return InputFileError.exit_code
    margin = limit - result.seconds
    print(
        f"pass: {task.name}, IPC {result.manifest['ipc']} ({result.manifest['rounds']} rounds), gone after "
        f"{result.seconds:.2f} s of {limit:g}, {margin:.2f} s ({margin / limit:.2%}) unused"
    )
    return 0


def rehearse(name: str, task: Task, limit: float, output: Path, options: Sequence[str]) -> Rehearsal:
    """Runs the job with `options` and a budget of `limit` seconds, and looks at what it leaves in `output`."""
    command = [str(RUN), name, "--budget", f"{limit:g}s", "--output", str(output), *options]
    environment = dict(os.environ)
    environment.pop("BANKO_STARTED_AT", None)  # which a harness outside does not set
    environment.setdefault("BANKO_PYTHON", sys.executable)
    code: int | None = None
    seconds: float | None = None
    written_after, began = time.time_ns(), time.monotonic()
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(limit - (time.monotonic() - began))
            seconds = time.monotonic() - began
    finally:
        # Whatever the group has left goes, too, be it at the limit or after Ctrl-C here.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    faults = []
    if seconds is None:
        faults.append(f"killed at the limit of {limit:g} s")
    elif code:
        faults.append(f"exit code {code}")
    file, beside = (output / f"{task.name}{suffix}" for suffix in (".pt", ".json"))
    for path in (file, beside):
        if not path.exists():
            return Rehearsal(seconds, [*faults, f"{path} does not exist"], {})
        if path.stat().st_mtime_ns < written_after:
            return Rehearsal(seconds, [*faults, f"{path} is older than this run"], {})
    try:
        faults += [f"{file}: {finding.text}" for finding in audit(file, task) if finding.fatal]
    except InputFileError as error:
        faults.append(str(error))
    return Rehearsal(seconds, faults, json.loads(beside.read_bytes()))


if __name__ == "__main__":
    raise SystemExit(main())

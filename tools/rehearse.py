"""Runs the job as the organisers would: under a hard limit, from outside, with what is on disk at the end as judge.

    ./run.sh rehearse cifar100 --limit 600 --max-ipc 10000

The job gets a process group of its own and the limit as its budget, for all tasks together; the clock starts before it
does. At the limit the whole group is killed. Then the files are audited.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission import cli
from submission.arguments import Parser, exit_code_of, interrupted_by_signals, parse_seconds
from submission.errors import InputFileError
from submission.tasks import Task, load_task
from tools import environment_of_run
from tools.reading.manifests import read_json
from tools.scoring.findings import audit

RUN = Path(__file__).resolve().parents[1] / "run.sh"


@dataclass(frozen=True)
class Judgement:
    """What is wrong with a task's file, and the job's manifest of it, empty where there is none."""

    task: Task
    faults: list[str]
    manifest: dict[str, Any]


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh rehearse",
        description="Runs the job in a process group of its own under a hard limit, kills it at the limit, audits what "
        "is on disk, and says pass or fail of every file, with the margin left. TASK and all other options are the "
        "job's: ./run.sh --help tells of them.",
        epilog="examples:\n  ./run.sh rehearse cifar100 --limit 10m --max-ipc 10000\n"
        "  ./run.sh rehearse cifar100 tinyimagenet --limit 20m\n\n"
        "exit codes: 0 pass; 2 usage; 6 fail",
    )
    # No positional argument: it would take the values of the job's options for its own.
    parser.usage = f"{parser.prog} TASK... [--limit TIME] [--output DIR] [the job's options]"
    add = parser.add_argument
    add(
        "--limit",
        default="600",
        metavar="TIME",
        help="when the job is killed: 600, 90s or 10m; also its --budget, or --total of several tasks, unless you give "
        "one",
    )
    add("--output", type=Path, default=Path("outputs"), metavar="DIR", help="gets the job's files")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options, passed_on = build_parser().parse_known_args(arguments)
    parser = cli.build_parser()
    parser.set_defaults(budget=None)
    job = parser.parse_intermixed_args(passed_on)
    with interrupted_by_signals():
        return exit_code_of(lambda: rehearse(options, job, passed_on))


def rehearse(options: argparse.Namespace, job: argparse.Namespace, passed_on: Sequence[str]) -> int:
    """Runs the job on the arguments that are `passed_on`, which mean the options `job`, and judges it; returns the exit
    code. Raises UsageError."""
    limit, tasks = parse_seconds(options.limit, "--limit"), [load_task(one) for one in job.tasks]
    # One that is resumed may leave a file as it is.
    written_after = 0 if job.resume else time.time_ns()
    time_limit = ["--budget" if len(tasks) == 1 else "--total", f"{limit:g}s"] if not (job.budget or job.total) else []
    seconds, code = run_job([*time_limit, "--output", str(options.output), *passed_on], limit)
    judgements = [judge(task, options.output, written_after) for task in tasks]
    failed = judgements if code is None else [one for one in judgements if one.faults]
    if code:
        failed = failed or judgements  # it tells of those files whose faults are seen, if there are any
    if code != 0:
        print("fault: " + (f"killed at the limit of {limit:g} s" if code is None else f"exit code {code}"))
    for one in judgements:
        # A file that is whole may still hold less than was made: the job's own warnings say so.
        for warning in one.manifest.get("warnings", []):
            print(f"warning of the job: {warning}")
        for fault in one.faults:
            print(f"fault: {fault}")
    margin = limit - seconds
    for one in judgements:
        if one in failed:
            print(f"fail: {one.task.name} under a limit of {limit:g} s")
            continue
        print(
            f"pass: {one.task.name}, IPC {one.manifest['ipc']} ({one.manifest['rounds']} rounds), gone after "
            f"{seconds:.2f} s of {limit:g}, {margin:.2f} s ({margin / limit:.2%}) unused"
        )
    return InputFileError.exit_code if failed else 0


def run_job(arguments: Sequence[str], limit: float) -> tuple[float, int | None]:
    """Runs the job for at most `limit` seconds. Returns the seconds after which it was gone, and its exit code, None
    where it was killed at the limit."""
    code: int | None = None
    began = time.monotonic()
    process = subprocess.Popen([str(RUN), *arguments], env=environment_of_run(), start_new_session=True)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(limit - (time.monotonic() - began))
        seconds = time.monotonic() - began
    finally:
        # Whatever the group has left goes, too, be it at the limit or after Ctrl-C here.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return seconds, code


def judge(task: Task, output: Path, written_after: int) -> Judgement:
    """Looks at what the job has left of a task since that moment, in nanoseconds since the epoch."""
    file, beside = (output / f"{task.name}{suffix}" for suffix in (".pt", ".json"))
    for path in (file, beside):
        if not path.exists():
            return Judgement(task, [f"{path} does not exist"], {})
        if path.stat().st_mtime_ns < written_after:
            return Judgement(task, [f"{path} is older than this run"], {})
    manifest: dict[str, Any] = {}
    try:
        manifest = read_json(beside)
        faults = [f"{file}: {finding.text}" for finding in audit(file, task) if finding.fatal]
    except InputFileError as error:
        faults = [str(error)]
    return Judgement(task, faults, manifest)


if __name__ == "__main__":
    raise SystemExit(main())

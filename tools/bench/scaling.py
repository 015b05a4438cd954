"""Rounds that two ranks make against one, with one thread and one core each and the same budget, in whole runs.

A rank alone is kept to one core: with a second one for its snapshots it would have more than each of two has. The runs
take turns, so that a machine whose speed drifts slows both alike; the ratio is taken turn by turn. It is of rounds in
finished files: what starting, agreeing and writing cost is in it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from submission.cli import number_from
from submission.errors import InputFileError

RUN = Path(__file__).resolve().parents[2] / "run.sh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=number_from(1), default=60, metavar="S", help="a run's budget, seconds (default: 60)"
    )
    parser.add_argument("--turns", type=number_from(1), default=3, metavar="N", help="runs a side (default: 3)")
    parser.add_argument("--processes", type=number_from(2), default=2, metavar="N", help="against one (default: 2)")


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Rounds of both sides by turn, the median, least and largest ratio of a turn, and what the runs warned of.

    Raises InputFileError.
    """
    rounds: dict[int, list[int]] = {1: [], options.processes: []}
    warnings = []
    for turn in range(options.turns):
        for processes, made in rounds.items():
            manifest = _run(processes, options.seconds)
            made.append(manifest["rounds"])
            warnings += [f"turn {turn + 1}, {processes} processes: {warning}" for warning in manifest["warnings"]]
    alone, together = rounds.values()
    ratios = [many / one for one, many in zip(alone, together, strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "speedup_least": min(ratios),
        "speedup_most": max(ratios),
        "processes": options.processes,
        "seconds": options.seconds,
        "rounds": {str(processes): made for processes, made in rounds.items()},
        "warnings": warnings,
    }


def table(figures: dict[str, Any]) -> str:
    lines = [f"{'ranks of one core':<22}{'ratio':>7}   rounds in {figures['seconds']} s, by turn"]
    for processes, made in figures["rounds"].items():
        ratio = 1 if processes == "1" else figures["speedup"]
        lines.append(f"{processes:<22}{ratio:>7.2f}   {', '.join(map(str, made))}")
    lines.append(f"ratios of a turn: {figures['speedup_least']:.2f} to {figures['speedup_most']:.2f}")
    return "\n".join([*lines, *figures["warnings"]])


def _run(processes: int, seconds: int) -> dict[str, Any]:
    """The manifest of one run on so many cores: the embedded checkpoint, no cap, no copies."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", "embedded", "--device", "cpu", "--max-ipc", "1000000", "--aug-per-image", "0"]
        command = [str(RUN), "cifar100", *options, "--budget", f"{seconds}s", "--output", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "BANKO_PYTHON": sys.executable}
        cores = sorted(os.sched_getaffinity(0))[:processes]
        if len(cores) < processes:
            raise InputFileError(f"{processes} ranks with a core each need more than the {len(cores)} cores there are")
        done = subprocess.run(
            [*command, "--processes", str(processes)],
            env=environment,
            preexec_fn=partial(os.sched_setaffinity, 0, cores),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InputFileError(f"a run of {processes} processes ended with code {done.returncode}: {done.stderr}")
        manifest: dict[str, Any] = json.loads((Path(folder) / "cifar100.json").read_text())
        return manifest

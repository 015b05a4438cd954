"""Rounds that several devices make against one in the same generating time, with one core and one thread each.

One device is the job as it is without Ray, kept to one core; several are actors of Ray. A turn runs both, so that a
machine whose speed drifts slows both alike, and the ratio is taken turn by turn. It is of rounds per second of
generating, from when the first device is ready to when the last file is begun; what starting Ray and the devices took
stands beside it.
"""

import argparse
import os
import statistics
from typing import Any

from submission.arguments import number_from
from submission.errors import UsageError
from tools.bench.jobs import run_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seconds", type=number_from(1), default=90, metavar="S", help="a run's budget, seconds")
    add("--turns", type=number_from(1), default=3, metavar="N", help="runs a side")
    add("--devices", type=number_from(2), default=2, metavar="N", help="against one")


def measure(options: argparse.Namespace) -> dict[str, object]:
    """By turn: rounds, seconds of generating and seconds to start of both sides; the median, least and largest ratio of
    a turn, and what the runs warned of. Raises UsageError, and InputFileError where a run fails."""
    if (cores := len(os.sched_getaffinity(0))) < options.devices:
        raise UsageError(f"--devices {options.devices} with a core each are more than the {cores} cores there are")
    turns: dict[int, list[dict[str, float]]] = {1: [], options.devices: []}
    warnings = []
    for turn in range(options.turns):
        for devices, runs in turns.items():
            manifest = _run(devices, options.seconds)
            phases, spans = manifest["phases_seconds"], manifest["phases_from_to"]
            runs.append(
                {
                    "rounds": manifest["rounds"],
                    "generating_seconds": phases["generate"],
                    "ray_seconds": phases.get("start Ray", 0.0),
                    "first_image_after": spans["generate"][0],
                }
            )
            warnings += [f"turn {turn + 1}, {devices} devices: {warning}" for warning in manifest["warnings"]]
    paces = [[run["rounds"] / run["generating_seconds"] for run in runs] for runs in turns.values()]
    ratios = [many / one for one, many in zip(*paces, strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "speedup_least": min(ratios),
        "speedup_most": max(ratios),
        "devices": options.devices,
        "seconds": options.seconds,
        "turns": {str(devices): runs for devices, runs in turns.items()},
        "warnings": warnings,
    }


def table(figures: dict[str, Any]) -> str:
    lines = [
        f"{'devices of one core':<22}{'ratio':>7}   by turn: rounds / seconds of generating (to start Ray, to begin)"
    ]
    for devices, runs in figures["turns"].items():
        ratio = 1 if devices == "1" else figures["speedup"]
        told = [
            "{rounds} / {generating_seconds:.1f} ({ray_seconds:.1f}, {first_image_after:.1f})".format(**run)
            for run in runs
        ]
        lines.append(f"{devices:<22}{ratio:>7.2f}   {', '.join(told)}")
    lines.append(f"ratios of a turn: {figures['speedup_least']:.2f} to {figures['speedup_most']:.2f}")
    return "\n".join([*lines, *figures["warnings"]])


def _run(devices: int, seconds: int) -> dict[str, Any]:
    """The manifest of one run on so many cores: the embedded checkpoint, no cap, no copies."""
    cores = sorted(os.sched_getaffinity(0))[:devices]
    options = ["--model", "embedded", "--devices", f"cpu:{devices}", "--max-ipc", "1000000", "--aug-per-image", "0"]
    manifest = run_job("cifar100", [*options, "--budget", f"{seconds}s"], cores, OMP_NUM_THREADS="1")
    if manifest is None:
        raise UsageError(f"--seconds {seconds} are too few for {devices} devices: give more")
    return manifest

"""Arguments to one JobConfig, errors to one line and an exit code."""

import argparse
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from submission.budget import Budget, parse_seconds, start_budget
from submission.errors import BankoError, UsageError
from submission.guard import Guard
from submission.launchers import place
from submission.tasks import Task, builtin_names, load_task

EXAMPLES = """examples:
  ./run.sh cifar100                              ten minutes, embedded model without a GPU, SDXL-Turbo with one
  ./run.sh tinyimagenet --budget 2m --seed 7     another task, budget and seed
  ./run.sh cifar100 --model models/sdxl-turbo --resolution 256
  ./run.sh my-classes.toml --prompts diverse     a task of your own, which init has written

tools, each with a --help of its own:
  ./run.sh init             writes a task of your own from a list of class names
  ./run.sh evaluate         scores a file as the organisers do
  ./run.sh audit            checks a file without training on it
  ./run.sh report           makes the page about a run anew
  ./run.sh rehearse         runs the job under a hard limit, as the organisers would
  ./run.sh bench            measures what this project claims
  ./run.sh make-checkpoint  writes random weights in SDXL-Turbo's layout
  ./run.sh fetch-weights    fetches SDXL-Turbo's files and checks them by SHA-256
  ./run.sh train-embedded   trains the embedded checkpoint
  ./run.sh test             runs everything that CI runs

exit codes:
  0 file complete   2 usage   3 the budget cannot hold one round   4 checkpoint missing, damaged or of the wrong kind
  5 output cannot be written
"""


class Parser(argparse.ArgumentParser):
    """Help whose examples stand as they were written, and wrong usage said in one line."""

    def __init__(self, *, prog: str, description: str, epilog: str) -> None:
        text = textwrap.fill(description, width=100)
        super().__init__(
            prog=prog, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"error: {message}; {self.prog} --help says more\n")


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh",
        description="Makes a class-balanced synthetic training set from class names, inside a time budget: "
        "DIR/NAME.pt, with a manifest (.json), a contact sheet (.png) and a report (.html).",
        epilog=EXAMPLES,
    )
    parser.add_argument("task", metavar="TASK", help=f"{', '.join(builtin_names())}, or the path of a task's .toml")
    parser.add_argument(
        "--budget",
        default="10m",
        metavar="TIME",
        help="from process start to exit, in seconds or minutes: 600, 90s or 10m (default: 10m)",
    )
    parser.add_argument(
        "--started-at",
        type=epoch,
        default=os.environ.get("BANKO_STARTED_AT"),
        metavar="EPOCH",
        help="when the budget began, in Unix seconds, if before this process (default: $BANKO_STARTED_AT, else its "
        "start)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), metavar="DIR", help="gets the files (default: outputs/)"
    )
    parser.add_argument(
        "--model",
        default="auto",
        metavar="MODEL",
        help="auto, embedded, a folder in SDXL-Turbo's layout, or a hub id; auto is $BANKO_MODEL, else "
        "models/sdxl-turbo, else SDXL-Turbo from the hub with a GPU and the embedded model without (default: auto)",
    )
    parser.add_argument(
        "--resolution",
        type=number_from(1),
        metavar="PX",
        help="width of the canvas to generate on, in pixels (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--aug-per-image",
        type=number_from(0),
        default=4,
        metavar="N",
        help="augmented copies an image at most; 0: none (default: 4)",
    )
    parser.add_argument(
        "--pda", choices=("paper", "natural", "none"), default="natural", help="how copies are made (default: natural)"
    )
    parser.add_argument(
        "--prompts",
        choices=("label", "described", "diverse"),
        default="described",
        help="bare class names, descriptions, or descriptions in phrasings taken in turn (default: described)",
    )
    parser.add_argument(
        "--decoder",
        choices=("auto", "linear", "distilled", "tiny", "vae"),
        default="auto",
        help="latents to pixels: a small network fitted to the VAE at once or trained for seconds, a tiny autoencoder "
        "beside the checkpoint, the VAE itself; auto takes what pace and fidelity make worth most (default: auto)",
    )
    parser.add_argument(
        "--max-ipc", type=number_from(1), metavar="N", help="most images a class in the file (default: the task's, 500)"
    )
    parser.add_argument(
        "--seed", type=number_from(0), default=0, metavar="N", help="of all that is random (default: 0)"
    )
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=None,
        metavar="N",
        help="images made at a time, or auto: what measures best (default: auto)",
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "never"),
        default="auto",
        help="compile the model while it is at work: auto does on a GPU where that pays back (default: auto)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the numbers in the file (default: float32)",
    )
    parser.add_argument(
        "--devices",
        type=devices,
        default="auto",
        metavar="N",
        help="auto: every GPU, or the CPU; N: so many GPUs, or parts of the CPU; cpu:N: parts of the CPU. Several work "
        "through Ray (default: auto)",
    )
    parser.add_argument(
        "--cluster",
        type=cluster,
        metavar="ADDRESS",
        help="join the Ray cluster at HOST:PORT, or auto: the one on this machine, and use all its GPUs, or --devices "
        "(default: none)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any (default: auto)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the rounds that an interrupted run left in the output folder"
    )
    parser.add_argument(
        "--log", choices=("plain", "rich", "json"), help="how to tell (default: rich on a terminal, else plain)"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(arguments: Sequence[str] | None = None, process_start: float | None = None) -> int:
    """Runs the command line and returns the exit code. `process_start` is in Unix seconds."""
    options = build_parser().parse_args(arguments)
    try:
        return _run(options, process_start or time.time())
    except BankoError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace, process_start: float) -> int:
    task = load_task(options.task)
    seconds = parse_seconds(options.budget)
    kind, _ = options.devices
    if kind == "cpu" and options.device == "cuda":
        raise UsageError("--devices cpu:N and --device cuda contradict each other: leave one of them out")
    rank, processes = (0, 1) if options.cluster else place()
    if rank:
        print(f"process {rank} of {processes} leaves: the first one drives all devices of this machine")
        return 0
    budget = start_budget(seconds, process_start, options.started_at)
    with Guard(budget) as guard:
        _run_job(options, task, budget, guard, processes)
    return 0


def _run_job(options: argparse.Namespace, task: Task, budget: Budget, guard: Guard, processes: int) -> None:
    # These take seconds to import, and wrong usage should be said at once.
    from submission.job import run  # noqa: PLC0415
    from submission.progress import Log, default_style  # noqa: PLC0415
    from submission.work import JobConfig  # noqa: PLC0415

    kind, count = options.devices
    config = JobConfig(
        task=task,
        output=options.output,
        model=options.model,
        resolution=options.resolution,
        copies=options.aug_per_image,
        pda=options.pda,
        prompts=options.prompts,
        decoder=options.decoder,
        cap=options.max_ipc or task.max_ipc,
        seed=options.seed,
        batch_size=options.batch_size,
        dtype=options.dtype,
        device=kind or options.device,
        devices=count,
        cluster=options.cluster,
        resume=options.resume,
        compiles=options.compile == "auto",
    )
    log = Log(options.log or default_style(), budget)
    if processes > 1:
        log.say(f"started as {processes} processes: this one drives all devices of this machine, the others leave")
    try:
        run(config, budget, log, guard)
    finally:
        log.close()


def number_from(low: int) -> Callable[[str], int]:
    """An argparse type: whole numbers not below `low`."""

    def number(text: str) -> int:
        # Python itself reads and takes more: 1_000, digits of all scripts, and numbers no library can hold.
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {low} or more")
        return int(text)

    return number


def batch_size(text: str) -> int | None:
    """An argparse type: `auto` is None."""
    return None if text == "auto" else number_from(1)(text)


def devices(text: str) -> tuple[str | None, int | None]:
    """An argparse type: `auto`, a number, or `cpu:` and a number, as kind and number; None is whatever there is."""
    if text == "auto":
        return None, None
    kind, separator, count = text.rpartition(":")
    if kind != ("cpu" if separator else ""):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, a number such as 8, and cpu:2")
    return kind or None, number_from(1)(count)


def cluster(text: str) -> str:
    """An argparse type: the address of a Ray cluster."""
    if text != "auto" and not re.fullmatch(r"[^:/\s]+:[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor HOST:PORT, such as 10.0.0.1:6379")
    return text


def epoch(text: str) -> float:
    """An argparse type: a moment in Unix seconds."""
    if not re.fullmatch(r"[0-9]{1,18}(\.[0-9]*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a moment in Unix seconds, such as 1735689600.5")
    return float(text)

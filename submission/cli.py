"""The job's command line: arguments to one JobRequest, errors to one line and an exit code."""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from submission.arguments import (
    Parser,
    add_device,
    batch_size,
    cluster,
    devices,
    epoch,
    exit_code_of,
    guidance,
    number_from,
    parse_seconds,
    prompts,
)
from submission.errors import OutputError, UsageError, importing
from submission.launchers import rank_and_count
from submission.plan.budget import Allowance, start_budget
from submission.tasks import Task, builtin_names, load_task, parse_prompts

if TYPE_CHECKING:
    from submission.job.run import Prepare
    from submission.log import Log
    from submission.request import JobRequest

EXAMPLES = """examples:
  ./run.sh cifar100                              ten minutes, embedded model without a GPU, SDXL-Turbo with one
  ./run.sh tinyimagenet --budget 2m --seed 7     another task, budget and seed
  ./run.sh cifar100 tinyimagenet --total 20m     both, one after the other, under one limit
  ./run.sh cifar100 --model models/sdxl-turbo --resolution 256
  ./run.sh my-classes.toml --prompts diverse     a task of your own, which init has written

tools, each with a --help of its own:
  ./run.sh init             writes a task of your own from a list of class names
  ./run.sh train            trains a model on images of your own, to draw from with --model
  ./run.sh evaluate         scores a file as the organisers do
  ./run.sh audit            checks a file without training on it
  ./run.sh report           makes the page about a run anew
  ./run.sh reproduce        makes and scores the published table with any model
  ./run.sh rehearse         runs the job under a hard limit, as the organisers would
  ./run.sh bench            measures what this project claims
  ./run.sh make-checkpoint  writes random weights in the layout of SDXL-Turbo or Stable Diffusion
  ./run.sh fetch-weights    fetches a model's files and checks them by SHA-256
  ./run.sh test             runs everything that CI runs

exit codes:
  0 complete   2 usage   3 the budget cannot hold one round   4 checkpoint missing, damaged or of the wrong kind
  5 output cannot be written; of several tasks, the code of the first that fails
"""


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh",
        description="Makes class-balanced synthetic training sets from class names, inside a time budget: of each task "
        "DIR/NAME.pt, with a manifest (.json), a contact sheet (.png) and a report (.html).",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("tasks", nargs="+", metavar="TASK", help=f"{', '.join(builtin_names())}, or the path of a task's .toml")
    time_limit = parser.add_mutually_exclusive_group()
    time_limit.add_argument(
        "--budget",
        default=os.environ.get("BANKO_BUDGET") or "10m",
        metavar="TIME",
        help="for each task: 600 (seconds), 90s or 10m, from process start to exit, for later tasks from their turn on "
        "(default: $BANKO_BUDGET, else 10m)",
    )
    time_limit.add_argument(
        "--total",
        metavar="TIME",
        help="for all tasks together, split by their classes, 15s each at least (default: each has its budget)",
    )
    add(
        "--started-at",
        type=epoch,
        default=os.environ.get("BANKO_STARTED_AT") or None,
        metavar="EPOCH",
        help="when the budget began, in Unix seconds (default: $BANKO_STARTED_AT, else the start of the process)",
    )
    add("--output", type=Path, default=Path("outputs"), metavar="DIR", help="gets the files")
    add(
        "--model",
        default="auto",
        metavar="MODEL",
        help="auto, embedded, a recipe's name or .toml, a folder in the layout of diffusers, or a hub id; auto is "
        "$BANKO_MODEL, else models/sdxl-turbo, else SDXL-Turbo from the hub with a GPU and the embedded model without",
    )
    add("--steps", type=number_from(1), metavar="N", help="passes of the UNet (default: the recipe's; else 1)")
    add(
        "--guidance",
        type=guidance,
        metavar="X",
        help="how far prompts are followed, up to 1: as they are; X:Y: drawn for each image (default: the recipe's)",
    )
    add("--resolution", type=number_from(1), metavar="PX", help="width of the canvas (default: the checkpoint's own)")
    add("--aug-per-image", type=number_from(0), default=4, metavar="N", help="copies per image at most; 0: none")
    add("--pda", choices=("paper", "natural", "none"), default="natural", help="how copies are made")
    add(
        "--prompts",
        type=prompts,
        metavar="STYLE",
        help="label, bare class names; described; diverse, descriptions in phrasings and domains taken in turn; or a "
        '.toml with lines such as apple = ["a photo of an apple", "a red apple"] (default: diverse, but for the '
        "embedded model, those of train, and tasks without phrasings, described)",
    )
    add(
        "--decoder",
        default="auto",
        metavar="RUNG",
        help="latents to pixels: linear or distilled, a small network fitted to the VAE at once or in seconds; tiny, "
        "an autoencoder beside the checkpoint; vae, the checkpoint's own; auto: by pace and fidelity",
    )
    add("--max-ipc", type=number_from(1), metavar="N", help="images per class at most (default: the task's, 500)")
    add(
        "--select",
        choices=("auto", "none"),
        default="auto",
        help="none: the images made first; auto: where there are at most 100 per class, those chosen from a pool that "
        "grows as long as time allows (default: auto)",
    )
    add(
        "--pool",
        type=number_from(1),
        metavar="N",
        help="choose from so many rounds at most, however many images per class (default: as time allows)",
    )
    add("--seed", type=number_from(0), default=0, metavar="N", help="of all that is random")
    add("--batch-size", type=batch_size, metavar="N", help="images made at a time (default: auto, what measures best)")
    add("--compile", choices=("auto", "never"), default="auto", help="compile the model, on a GPU where that pays back")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the numbers in the file")
    add(
        "--devices",
        type=devices,
        default="auto",
        metavar="N",
        help="auto: every GPU, or the CPU; N: so many GPUs, or parts of the CPU; cpu:N: parts of it; several use Ray",
    )
    add(
        "--cluster",
        type=cluster,
        metavar="ADDRESS",
        help="join a Ray cluster, HOST:PORT or auto, and use its GPUs, or so many --devices (default: none)",
    )
    add_device(parser)
    add(
        "--resume",
        action="store_true",
        help="go on from the rounds that an interrupted run left in the output folder; a file that is complete is left "
        "as it is",
    )
    add("--log", choices=("plain", "rich", "json"), help="how to tell (default: rich on a terminal, else plain)")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def main(
    arguments: Sequence[str] | None = None,
    process_start: float | None = None,
    prepare: "Prepare | None" = None,
) -> int:
    """Runs the command line and returns the exit code. `process_start` is in Unix seconds; `submission.job.run` says
    what `prepare` is for."""
    # Tasks may stand on both sides of options.
    options = build_parser().parse_intermixed_args(arguments)
    return exit_code_of(
        lambda: _run(options, process_start or time.time(), prepare), debug=options.debug, file_error=OutputError
    )


def _run(options: argparse.Namespace, process_start: float, prepare: "Prepare | None") -> int:
    tasks = [load_task(one) for one in options.tasks]
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{twice[0]} is asked for twice: each task has a file of its own, {twice[0]}.pt")
    seconds = parse_seconds(options.total, "--total") if options.total else parse_seconds(options.budget)
    if options.devices[0] == "cpu" and options.device == "cuda":
        raise UsageError("--devices cpu:N and --device cuda contradict each other: leave one of them out")
    rank, processes = (0, 1) if options.cluster else rank_and_count()
    if rank:
        print(f"process {rank} of {processes} leaves: the first one drives all devices of this machine")
        return 0
    start = start_budget(seconds, process_start, options.started_at).start
    allowance = Allowance(seconds, start, shared=bool(options.total))

    def ask(log: "Log") -> "Sequence[JobRequest]":
        if processes > 1:
            here = "this one drives all devices of this machine, the others leave"
            log.say(f"started as {processes} processes: {here}")
        return [_request(options, task, tasks) for task in tasks]

    with importing():
        from submission.job.sequence import run_in_turn  # noqa: PLC0415  # slow to import
        from submission.log import default_style  # noqa: PLC0415

    return run_in_turn(tasks, ask, allowance, options.log or default_style(), prepare, debug=options.debug)


def _request(options: argparse.Namespace, task: Task, tasks: "Sequence[Task]") -> "JobRequest":
    # These take seconds to import, and wrong usage should be said at once.
    from submission.model.choice import ModelRequest  # noqa: PLC0415
    from submission.model.decoder import RUNGS  # noqa: PLC0415  # slow to import
    from submission.model.image_spec import ImageSpec  # noqa: PLC0415
    from submission.plan.estimates import Composition  # noqa: PLC0415
    from submission.request import MOST_CHOSEN, MOST_POOL, DeviceRequest, JobRequest  # noqa: PLC0415

    if options.decoder not in ("auto", *RUNGS):
        known = ", ".join(("auto", *RUNGS))
        raise UsageError(f"argument --decoder: {options.decoder!r} is none of {known}; ./run.sh --help says more")
    kind, count = options.devices
    style, file = options.prompts, options.prompts if isinstance(options.prompts, Path) else None
    if file:
        task, style = replace(task, own_prompts=parse_prompts(file, task, tasks)), "own"
    cap, pool = options.max_ipc or task.max_ipc, options.pool
    if pool and options.select == "none":
        raise UsageError("--pool is what to choose from, and --select none chooses nothing: leave out one of them")
    if pool is None:
        pool = MOST_POOL if options.select == "auto" and cap <= MOST_CHOSEN else 0
    return JobRequest(
        image=ImageSpec(task, style, options.seed, options.resolution, options.decoder, file),
        model=ModelRequest(options.model, options.steps, options.guidance),
        output=options.output,
        composition=Composition(
            len(task.classes),
            0 if options.pda == "none" else options.aug_per_image,
            cap=cap,
            pool=pool,
        ),
        pda=options.pda,
        dtype=options.dtype,
        devices=DeviceRequest(
            kind or options.device, count, options.cluster, options.batch_size, options.compile == "auto"
        ),
        resume=options.resume,
        tasks=tuple(one.name for one in tasks),
    )

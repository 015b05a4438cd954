"""Checks a training set's file without training on it, and draws it.

    ./run.sh audit outputs/cifar100.pt

A wrong order of classes does not show in the numbers; `./run.sh evaluate` looks for that.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from submission.arguments import Parser, exit_code_of
from submission.dataset.dataset_file import mean_and_std
from submission.errors import InputFileError, UsageError
from submission.machine.disk import write_json, write_whole
from submission.report.contact_sheet import MOST_CLASSES, draw_contact_sheet
from submission.tasks import Task, load_task
from tools.reading.tensor_files import LabelledImages, read_submission
from tools.scoring.findings import Finding, inspect


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh audit",
        description="Checks a training set's file without training on it, and draws one image of each class.",
        epilog="examples:\n  ./run.sh audit outputs/cifar100.pt\n"
        "  ./run.sh audit outputs/my-classes.pt --task my-classes.toml\n\n"
        "exit codes: 0 nothing wrong, or warnings alone; 2 usage; 5 output cannot be written; 6 a bad file",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE.pt", help="what the job has made, or anyone: a tensor of torch.save")
    add("--task", metavar="TASK", help="a name, or a task's .toml (default: the one called like the file)")
    add("--sheet", type=Path, metavar="PATH", help="the picture (default: FILE.audit.png, beside it)")
    add("--json", type=Path, metavar="PATH", help="write what was found there as well")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: _audit(options))


def _audit(options: argparse.Namespace) -> int:
    """Print and write what was found; returns the exit code. Raises UsageError, InputFileError, OutputError."""
    try:
        task = load_task(options.task or options.file.stem)
    except UsageError as error:
        raise error if options.task else UsageError(f"--task is missing: {error}") from error
    facts: dict[str, object] = {"file": str(options.file), "task": task.name}
    try:
        data = read_submission(options.file, task)
    except InputFileError as error:
        if options.json:
            findings = [Finding("refused", True, str(error))]
            write_json(options.json, {**facts, "good": False, "findings": [asdict(one) for one in findings]})
        raise
    findings = inspect(data, task)
    good = not any(finding.fatal for finding in findings)
    ipc, dtype = len(data.labels) // len(task.classes), str(data.images.dtype).removeprefix("torch.")
    print(f"{options.file}: {ipc} images per class for the {len(task.classes)} classes of {task.name}, {dtype}")
    for finding in findings:
        print(f"{'ERROR' if finding.fatal else 'warning'}: {finding.text}")
    sheet = options.sheet or options.file.with_suffix(".audit.png")
    write_whole(sheet, _draw(data, task))
    shown = "each class" if len(task.classes) <= MOST_CLASSES else f"each of the first {MOST_CLASSES} classes"
    print(f"{'good' if good else 'BAD'}; one image of {shown}, to be looked at: {sheet}")
    if options.json:
        facts |= {"ipc": ipc, "dtype": dtype, "good": good, "findings": [asdict(one) for one in findings]}
        write_json(options.json, facts)
    return 0 if good else InputFileError.exit_code


def _draw(data: LabelledImages, task: Task) -> bytes:
    """A contact sheet of the first image of each class."""
    classes = task.classes[:MOST_CLASSES]
    firsts = data.images[:: len(data.labels) // len(task.classes)][: len(classes)].float()
    mean, std = mean_and_std(task)
    pixels = ((firsts * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return draw_contact_sheet(pixels.numpy(), [one.name for one in classes])


if __name__ == "__main__":
    raise SystemExit(main())

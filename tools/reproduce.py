"""The published experiment with any model: Table 1 and Figure 2 of Su et al., "Generative Dataset Distillation Based on
Diffusion Model" (arXiv 2408.08610), with the published class order of CIFAR-100 beside the right one.

    ./run.sh reproduce --model models/sdxl-turbo --truth_dir reference_data
"""

import argparse
import io
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from submission.arguments import Parser, exit_code_of, interrupted_by_signals, number_from
from submission.dataset.dataset_file import FileSpec, mean_and_std, write_dataset
from submission.errors import InputFileError, OutputError, UsageError
from submission.machine.disk import write_whole
from submission.tasks import Task, load_task
from tools import environment_of_run
from tools.reading.real_images import find_test_images
from tools.reading.tensor_files import read_submission
from tools.scoring.class_order import known_orders
from tools.scoring.results import PUBLISHED

RUN = Path(__file__).resolve().parents[1] / "run.sh"
# Images of each class that were generated, and copies made of each, in the published experiment.
GENERATED, COPIES = {"cifar100": 20, "tinyimagenet": 10}, 4
# Figure 2 shows so many classes, a column each: a generated image, and its copies below.
SHEET_CLASSES, CELL = 10, 96


@dataclass(frozen=True)
class Row:
    """A training set of the table, in a folder of its own, and the published accuracy, where there is one."""

    task: Task
    folder: Path
    images: str
    order: str
    published: float | None = None


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh reproduce",
        description="Makes and scores the training sets of the published table: images of the class names alone, and "
        "with the published copies; for CIFAR-100 also in the published order of classes. Draws the published figure. "
        "All other options go to the job.",
        epilog="examples:\n  ./run.sh reproduce --model models/sdxl-turbo --truth_dir reference_data\n"
        "  ./run.sh reproduce --tasks cifar100 --model embedded --max-steps 400\n\n"
        "exit codes: 0 done; 2 usage; 5 output cannot be written; 6 the job or the evaluator refused",
    )
    add = parser.add_argument
    # No positional argument: it would take the values of the job's options for its own.
    add("--tasks", nargs="+", default=[*GENERATED], metavar="TASK", help="of cifar100 and tinyimagenet (default: both)")
    add("--truth_dir", type=Path, default=Path("reference_data"), metavar="DIR", help="the evaluator's")
    add("--output_dir", type=Path, default=Path("reproduction"), metavar="DIR", help="gets table, sheets and files")
    add("--max-steps", type=number_from(1), metavar="S", help="the evaluator's (default: the full recipe)")
    add("--runs", type=number_from(1), default=3, metavar="N", help="networks trained for each row")
    add("--protocol", choices=("official", "fast"), default="fast", help="the evaluator's")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options, passed_on = build_parser().parse_known_args(arguments)
    with interrupted_by_signals():
        return exit_code_of(lambda: reproduce(options, passed_on), debug=options.debug)


def reproduce(options: argparse.Namespace, passed_on: Sequence[str]) -> None:
    """Makes, scores, tells. Raises UsageError, InputFileError, OutputError."""
    if unknown := set(options.tasks) - GENERATED.keys():
        raise UsageError(f"nothing was published of {min(unknown)}: the tasks are {' and '.join(GENERATED)}")
    tasks = [load_task(name) for name in options.tasks]
    for task in tasks:
        find_test_images(options.truth_dir, task)  # what the scores want is missed now, and not when all is made
    rows = [row for task in tasks for row in make(task, options.output_dir, passed_on)]
    lines = [
        "| task | images per class | order of classes | accuracy | each run | published |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = score(row, options)
        published = f"{row.published:.4f}" if row.published else ""
        each, mean = ", ".join(f"{run:.4f}" for run in runs), f"{fmean(runs):.4f}"
        lines.append(f"| {row.task.title} | {row.images} | {row.order} | {mean} | {each} | {published} |")
    table = "\n".join(lines) + "\n"
    write_whole(options.output_dir / "table.md", table.encode())
    figures = ", ".join(f"{task.name}.png" for task in tasks)
    print(f"\n{table}\n{options.output_dir}: table.md, and the figure: {figures}")


def make(task: Task, output: Path, passed_on: Sequence[str]) -> list[Row]:
    """The task's training sets, of the images of one job. Raises InputFileError, OutputError."""
    count = GENERATED[task.name]
    generated, augmented = output / "generated", output / "augmented"
    job = [task.name, "--prompts", "label", "--aug-per-image", "0", "--select", "none", "--max-ipc", str(count)]
    call([*job, *passed_on, "--output", str(generated)])
    images = read_images(generated / f"{task.name}.pt", task)
    if len(images) < count:
        raise InputFileError(f"the job made {len(images)} images per class of {count}: give it a longer --budget")
    copies = f"{count}, and {COPIES} copies of each"
    rows = [Row(task, generated, str(count), "the evaluator's")]
    published = PUBLISHED[task.name]
    if task.name == "cifar100":
        order, other = list(known_orders(task)["by superclass"]), output / "augmented-published-order"
        rows.append(Row(task, augmented, copies, "the evaluator's"))
        rows.append(Row(task, other, copies, "the published one", published))
        augment(images[:, order], task, other)
    else:
        rows.append(Row(task, augmented, copies, "the evaluator's", published))
    augment(images, task, augmented)
    figure = draw_figure(read_images(augmented / f"{task.name}.pt", task), count)
    write_whole(output / f"{task.name}.png", figure)
    return rows


def read_images(file: Path, task: Task) -> NDArray[np.uint8]:
    """A file's images, uint8 [IPC, classes, 3, size, size]. Raises InputFileError."""
    mean, std = mean_and_std(task)
    pixels = (read_submission(file, task).images.float() * std + mean).mul(255).round().clamp(0, 255)
    by_class: NDArray[np.uint8] = pixels.byte().view(len(task.classes), -1, 3, task.size, task.size).numpy()
    return by_class.swapaxes(0, 1)


def augment(images: NDArray[np.uint8], task: Task, folder: Path) -> None:
    """Writes the images and their published copies, as the job would. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder} ({error.strerror})") from error
    spec = FileSpec(task, len(images) * (1 + COPIES), "paper", 0, torch.float32)
    write_dataset(folder / f"{task.name}.pt", images, spec)


def draw_figure(images: NDArray[np.uint8], generated: int) -> bytes:
    """A PNG: an image of each of the first classes, below it its copies, each `generated` places further on."""
    shown = images[::generated, :SHEET_CLASSES].transpose(0, 3, 1, 4, 2)
    rows, height, columns, width, _ = shown.shape
    sheet = Image.fromarray(np.ascontiguousarray(shown).reshape(rows * height, columns * width, 3))
    png = io.BytesIO()
    sheet.resize((columns * CELL, rows * CELL), Image.Resampling.NEAREST).save(png, format="PNG")
    return png.getvalue()


def score(row: Row, options: argparse.Namespace) -> list[float]:
    """The accuracy of each run of the evaluator on the row. Raises InputFileError."""
    arguments = ["--submit_dir", row.folder, "--output_dir", row.folder / "scores", "--truth_dir", options.truth_dir]
    arguments += ["--tasks", row.task.name, "--runs", options.runs, "--protocol", options.protocol]
    if options.max_steps:
        arguments += ["--max-steps", options.max_steps]
    print(f"\n{row.task.title}; images per class: {row.images}; order of classes: {row.order}", flush=True)
    call(["evaluate", *map(str, arguments)])
    results = json.loads((row.folder / "scores/results.json").read_text())
    runs: list[float] = results["tasks"][row.task.name]["runs"]
    return runs


def call(arguments: Sequence[str]) -> None:
    """Runs the job or a tool as a person would. Raises InputFileError where it fails; it has said why."""
    if code := subprocess.run([str(RUN), *arguments], env=environment_of_run(), check=False).returncode:
        raise InputFileError(f"./run.sh {arguments[0]} ended with exit code {code}, as said above")


if __name__ == "__main__":
    raise SystemExit(main())

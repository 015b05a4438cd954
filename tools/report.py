"""Makes the page about a run anew: where there was no time for it, or with what `evaluate` found.

    ./run.sh report outputs/cifar100.json

All that it shows is in the manifest and in the `.pt` beside it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from submission.cli import Parser
from submission.errors import InputFileError
from submission.manifest import write_whole
from submission.report import render
from submission.tasks import Task, builtin_names, load_task
from tools.command import exit_code_of
from tools.tensor_files import read_submission


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh report",
        description="Makes the page about a run, NAME.html, from its manifest and the NAME.pt beside it.",
        epilog="examples:\n  ./run.sh report outputs/cifar100.json\n"
        "  ./run.sh report outputs/my-classes.json --task my-classes.toml\n\n"
        "exit codes: 0 made; 2 usage; 5 output cannot be written; 6 a file was refused",
    )
    parser.add_argument("manifest", type=Path, metavar="NAME.json", help="what the job left beside NAME.pt")
    parser.add_argument(
        "--task",
        metavar="TASK",
        help=f"{', '.join(builtin_names())}, or a task's .toml (default: the one that the manifest names)",
    )
    parser.add_argument(
        "--results", type=Path, metavar="PATH", help="results.json of evaluate, to be shown as well (default: none)"
    )
    parser.add_argument("--page", type=Path, metavar="PATH", help="the page (default: NAME.html, beside the manifest)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: _report(options))


def _report(options: argparse.Namespace) -> None:
    """Raises UsageError, InputFileError, OutputError."""
    manifest = read_manifest(options.manifest)
    task = load_task(options.task or manifest["task"])
    images = read_submission(options.manifest.with_suffix(".pt"), task).images
    results = _read_json(options.results) if options.results else None
    if results is not None and task.name not in results.get("tasks", {}):
        raise InputFileError(f"{options.results}: no results of evaluate for {task.name}")
    page = options.page or options.manifest.with_suffix(".html")
    write_report(page, task, manifest, images, results)
    print(page)


def read_manifest(path: Path) -> dict[str, Any]:
    """A run's manifest. Raises InputFileError."""
    manifest = _read_json(path)
    if not {"task", "ipc", "progress"} <= manifest.keys():
        raise InputFileError(f"{path}: not the manifest of a run, or of one by an older version")
    return manifest


def write_report(
    page: Path, task: Task, manifest: Mapping[str, Any], images: Tensor, results: Mapping[str, Any] | None
) -> None:
    """Writes the page, if the manifest is the images' own. Raises InputFileError, OutputError."""
    described = (manifest["task"], len(task.classes) * manifest["ipc"])
    if described != (task.name, len(images)):
        raise InputFileError(
            f"the manifest tells of {described[1]:,} images for {described[0]}, and these are {len(images):,} for "
            f"{task.name}: it belongs to another file"
        )
    write_whole(page, render(task, manifest, images, results).encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputFileError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputFileError(f"{path}: not a manifest or results, but a {type(content).__name__}")
    return content


if __name__ == "__main__":
    sys.exit(main())

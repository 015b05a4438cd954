"""Makes the page about a run anew: where there was no time for it, or with what `evaluate` found.

    ./run.sh report outputs/cifar100.json

All that it shows is in the manifest and in the `.pt` beside it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from submission.arguments import Parser, exit_code_of
from submission.errors import InputFileError
from submission.machine.disk import write_whole
from submission.tasks import load_task
from tools.reading.manifests import page_about, read_json, read_manifest
from tools.reading.tensor_files import read_submission


def build_parser() -> Parser:
    parser = Parser(
        prog="./run.sh report",
        description="Makes the page about a run, NAME.html, from its manifest and the NAME.pt beside it.",
        epilog="examples:\n  ./run.sh report outputs/cifar100.json\n"
        "  ./run.sh report outputs/my-classes.json --task my-classes.toml\n\n"
        "exit codes: 0 made; 2 usage; 5 output cannot be written; 6 a file was refused",
    )
    add = parser.add_argument
    add("manifest", type=Path, metavar="NAME.json", help="what the job left beside NAME.pt")
    add("--task", metavar="TASK", help="a name, or a task's .toml (default: the one that the manifest names)")
    add("--results", type=Path, metavar="PATH", help="results.json of evaluate, to be shown as well (default: none)")
    add("--page", type=Path, metavar="PATH", help="the page (default: NAME.html, beside the manifest)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = build_parser().parse_args(arguments)
    return exit_code_of(lambda: _make_page(options))


def _make_page(options: argparse.Namespace) -> None:
    """Raises UsageError, InputFileError, OutputError."""
    manifest = read_manifest(options.manifest)
    task = load_task(options.task or manifest["task"])
    images = read_submission(options.manifest.with_suffix(".pt"), task).images
    results = read_json(options.results) if options.results else None
    of_tasks = results.get("tasks") if results else None
    if results is not None and not (isinstance(of_tasks, dict) and isinstance(of_tasks.get(task.name), dict)):
        raise InputFileError(f"{options.results}: no results of evaluate for {task.name}")
    page = options.page or options.manifest.with_suffix(".html")
    write_whole(page, page_about(options.manifest, manifest, task, images, results))
    print(page)


if __name__ == "__main__":
    raise SystemExit(main())

"""Benchmarks: each measures two or more ways of doing one thing side by side in one run, and prints the ratio.

./run.sh bench evaluator --json evaluator.json
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from submission.manifest import write_json
from tools.command import exit_code_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    A benchmark is a module beside this file with `add_arguments(parser)`, `measure(options)`, which returns its figures
    by name, and `table(figures)`, which shows them to a person.
    """
    folder = str(Path(__file__).parent)
    modules = {
        found.name: importlib.import_module(f"tools.bench.{found.name}")
        for found in pkgutil.iter_modules([folder])
        if found.name != "__main__"
    }
    parser = argparse.ArgumentParser(prog="./run.sh bench", description="Measures what this project claims.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in modules.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = names.add_parser(name, help=summary, description=summary)
        command.add_argument("--json", type=Path, metavar="PATH", help="write the figures there as well")
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    return exit_code_of(lambda: _run(modules[options.name], options))


def _run(module: ModuleType, options: argparse.Namespace) -> None:
    figures = module.measure(options)
    if options.json:
        write_json(options.json, figures)
    print(module.table(figures))


if __name__ == "__main__":
    sys.exit(main())

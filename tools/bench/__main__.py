"""Benchmarks: each measures two or more ways of doing one thing side by side in one run, and prints the ratio.

./run.sh bench evaluator --json evaluator.json
"""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from submission.arguments import Parser, exit_code_of
from submission.errors import OutputError
from submission.machine.disk import write_json

BENCHES = ("card", "evaluator", "scaling", "scheduler", "throughput")
CODES = "exit codes: 0 measured; 2 usage; 4 checkpoint refused; 5 figures cannot be written; 6 a run it measures failed"
EPILOG = f"example:\n  ./run.sh bench scheduler --traces 10000\n\n{CODES}"


def find_benches() -> dict[str, ModuleType]:
    """The modules by name. Each has `add_arguments(parser)`, `measure(options)`, which returns its figures by name, and
    `table(figures)`, which shows them to a person."""
    return {name: importlib.import_module(f"tools.bench.{name}") for name in BENCHES}


def build_parser(benches: Mapping[str, ModuleType]) -> Parser:
    parser = Parser(
        prog="./run.sh bench",
        description="Measures what this project claims. `./run.sh bench NAME --help` says more of each.",
        epilog=EPILOG,
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, bench in benches.items():
        summary = (bench.__doc__ or "").splitlines()[0]
        epilog = f"example:\n  ./run.sh bench {name} --json {name}.json\n\n{CODES}"
        command = names.add_parser(
            name, prog=f"./run.sh bench {name}", help=summary, description=summary, epilog=epilog
        )
        command.add_argument("--json", type=Path, metavar="PATH", help="write the figures there as well")
        bench.add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    benches = find_benches()
    options = build_parser(benches).parse_args(arguments)
    return exit_code_of(lambda: _run(benches[options.name], options))


def _run(bench: ModuleType, options: argparse.Namespace) -> None:
    if options.json and not options.json.parent.is_dir():  # now, and not after minutes of measuring
        raise OutputError(f"{options.json}: there is no folder {options.json.parent}")
    figures = bench.measure(options)
    if options.json:
        write_json(options.json, figures)
    print(bench.table(figures))


if __name__ == "__main__":
    raise SystemExit(main())

"""Help that teaches: every option says what it is and what it is without it, and every command has an example."""

import argparse

import pytest

from submission import cli
from tools import audit, evaluate, init, make_checkpoint, rehearse, report, train
from tools.bench import __main__ as bench

BENCH = bench.build_parser(bench.find_benches())
MODULES = (cli, audit, evaluate, init, make_checkpoint, rehearse, report, train)
PARSERS = [module.build_parser() for module in MODULES]
SUBPARSERS = next(action for action in BENCH._actions if isinstance(action, argparse._SubParsersAction))
COMMANDS: dict[str, argparse.ArgumentParser] = {p.prog: p for p in [*PARSERS, BENCH, *SUBPARSERS.choices.values()]}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_command_is_explained(name: str) -> None:
    parser = COMMANDS[name]
    text = parser.format_help()
    assert "example" in text and f"\n  {name}" in text and "exit codes:" in text
    assert max(map(len, (parser.epilog or "").splitlines())) <= 120
    for action in parser._actions:
        if action is not SUBPARSERS:
            assert action.help, action.dest
        if action.option_strings and action.nargs != 0 and not action.required and action.dest != "json":
            assert action.default is not None or "default: " in (action.help or ""), action.dest
    assert name == BENCH.prog or "(default: " in text

"""`python -m tools NAME`: a command, whose libraries may take seconds to import, or fail to."""

import importlib
import os
import pkgutil
import sys

import tools
from submission.arguments import Parser, exit_code_of
from submission.errors import importing
from submission.streams import exit_at_once

# Threads that wait for each other sleep instead of spinning, as in the job (`submission.__main__`). Beside another busy
# process on two cores a training of 60 s took 75 s with the default, and 63 s so; with the cores to itself, the
# evaluator made 1,090 and 1,094 images/s.
os.environ.setdefault("GOMP_SPINCOUNT", "0")


def main() -> int:
    """Runs the command that is named first, and returns its exit code."""
    files = {one.name for one in pkgutil.iter_modules(tools.__path__) if not one.ispkg} - {"__main__"}
    commands = {name: f"tools.{name}" for name in files} | {"bench": "tools.bench.__main__"}
    parser = Parser(prog="python -m tools", description="Runs a tool, as ./run.sh NAME does.", epilog="")
    parser.add_argument("name", choices=sorted(commands))
    name = parser.parse_args(sys.argv[1:2]).name

    def run() -> int:
        with importing():
            module = importlib.import_module(commands[name])
        code: int = module.main(sys.argv[2:])
        return code

    return exit_code_of(run)


if __name__ == "__main__":
    exit_at_once(main())

"""`python -m tools NAME`: a command, whose libraries may take seconds to import, or fail to."""

import importlib
import os
import sys

from submission.arguments import exit_code_of
from submission.errors import importing

# Threads that wait for each other sleep instead of spinning, as in the job (`submission.__main__`). Beside another busy
# process on two cores a training of 60 s took 75 s with the default, and 63 s so; with the cores to itself, the
# evaluator made 1,090 and 1,094 images/s.
os.environ.setdefault("GOMP_SPINCOUNT", "0")


def main() -> int:
    """Runs the command that is named first, and returns its exit code."""
    name, *arguments = sys.argv[1:]

    def run() -> int:
        with importing():
            module = importlib.import_module("tools.bench.__main__" if name == "bench" else f"tools.{name}")
        code: int = module.main(arguments)
        return code

    return exit_code_of(run)


if __name__ == "__main__":
    raise SystemExit(main())

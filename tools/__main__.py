"""`python -m tools NAME`: a command, whose libraries may take seconds to import, or fail to."""

import importlib
import sys

from submission.arguments import exit_code_of
from submission.errors import importing


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

"""What runs outside the budget: a file per command of `./run.sh`, and their parts in folders."""

import os
import sys


def environment_of_run() -> dict[str, str]:
    """The environment for a `./run.sh` that a tool starts: by the same Python, and with a budget of its own."""
    environment = {"BANKO_PYTHON": sys.executable} | os.environ
    environment.pop("BANKO_STARTED_AT", None)
    return environment

"""What the command lines of the tools have in common."""

import signal
import sys
from collections.abc import Callable

from submission.errors import BankoError, InputFileError


def exit_code_of(work: Callable[[], int | None], *, debug: bool = False) -> int:
    """The exit code of a tool: 0 or what `work` returns; an error's own, told in one line; 130 after Ctrl-C.

    Args:
        debug: let errors through, with their tracebacks.
    """
    try:
        return work() or 0
    except BankoError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # of a file or folder that was handed to the tool: what it writes has errors of its own
        if debug:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return InputFileError.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT

"""Standard output and error of a process that goes on when nobody reads them, or not in Unicode."""

import io
import os
import sys
from typing import NoReturn


class Stream(io.TextIOWrapper):
    """A standard stream whose text is dropped from the first error on, which `lost` then tells.

    Characters that its encoding lacks are written as escapes.
    """

    lost: str | None = None

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        self.lost = error.strerror
        # What is still in the buffer would raise the error again, at the latest when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def open_streams() -> None:
    """Puts such streams in the place of Python's, once. Those that are closed lead nowhere from here on: what goes to
    them would otherwise land in the next file that is opened."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        was = getattr(sys, name)
        if was is None:
            stream = Stream(open(os.devnull, "wb"), "utf-8")  # noqa: PTH123, SIM115
            stream.lost = "it is closed"
        elif type(was) is io.TextIOWrapper:
            # Its own buffer may hold what cannot be written.
            lines = was.line_buffering or name == "stderr"
            raw = open(was.fileno(), "wb", closefd=False)  # noqa: SIM115
            stream = Stream(raw, was.encoding, "backslashreplace", None, line_buffering=lines)
        else:  # a test's, or put there already
            continue
        setattr(sys, name, stream)


def exit_at_once(code: int) -> NoReturn:
    """Ends the process, when all that was said is out: taking torch and its libraries apart in order takes up
    to three seconds, and may abort where threads of theirs are still at work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_output() -> str | None:
    """Why standard output is not written any more, where it is not."""
    return getattr(sys.stdout, "lost", None)

"""An exception for each exit code. Raised where the fact is known, turned into one line by the command line."""

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class BankoError(Exception):
    """A failure with a one-line message that says what is wrong and what to do, and the exit code for it."""

    exit_code = 1

    def __str__(self) -> str:
        return super().__str__().replace("\n", "\\n")  # that of a file's name, as a rule


class UsageError(BankoError):
    """The request makes no sense: an option, a task file, a device that is not there."""

    exit_code = 2


class BudgetError(BankoError):
    """The budget cannot hold even one round."""

    exit_code = 3


class CheckpointError(BankoError):
    """A checkpoint is missing, damaged or of the wrong kind."""

    exit_code = 4


class OutputError(BankoError):
    """The output cannot be written."""

    exit_code = 5


class InputFileError(BankoError):
    """A file handed to a tool was refused."""

    exit_code = 6


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def as_word(path: Path) -> str:
    """A path as a word of a command line, which is not taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


@contextmanager
def importing() -> Iterator[None]:
    """Turns what keeps libraries from being imported into a UsageError: packages that are missing, or variables of the
    environment that they do not understand. Where Ctrl-C is Python's, it ends the process at once meanwhile: libraries
    would take it for an error of their own."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    interrupts = on_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interrupts:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    except BankoError:
        raise
    except Exception as error:  # of any class
        own = os.environ.get("BANKO_PYTHON")
        remedy = f"install requirements.txt for {own}" if own else "remove .venv, and the next start makes it anew"
        raise UsageError(
            f"libraries cannot be imported ({first_line(error)}): if no limit on memory and no variable of the "
            f"environment explains it, {remedy}"
        ) from error
    finally:
        if interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def told_by_the_system(error: OSError) -> str:
    """What the system said of a file, in a line."""
    return f"{error.filename or 'the system'}: {error.strerror or error}"


def cannot_write(path: Path, error: OSError, size: float) -> OutputError:
    """What kept `size` bytes from being written there, and what to do about it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = f"{size / 1e6:,.2f} MB are needed there: make room" if full else "choose a place that you can write to"
    return OutputError(f"cannot write {path} ({error.strerror}): {advice}")

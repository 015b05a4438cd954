"""Command lines: help that shows examples as they were written, types of arguments, errors to one line and a code."""

import argparse
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from submission.errors import BankoError, InputFileError, UsageError, told_by_the_system
from submission.streams import open_streams

# How a class is asked for (`submission.tasks`).
STYLES = ("label", "described", "diverse")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says the default of every option whose help does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = action.required or action.nargs == 0 or action.default is None or "default:" in text
        return text if told else f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Help whose examples stand as they were written, and wrong usage said in one line."""

    def __init__(self, *, prog: str, description: str, epilog: str) -> None:
        text = textwrap.fill(description, width=100)
        super().__init__(prog=prog, description=text, epilog=epilog, formatter_class=_Help)

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"error: {message}; {self.prog} --help says more\n")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds `--device`, for the commands that compute."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP end a command as Ctrl-C does, so that what it has started ends with it.

    No pool of processes may be begun in it: it ends them by SIGTERM, and one that has only just been forked would go on
    as if it were the command.
    """
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code_of(
    work: Callable[[], int | None], *, debug: bool = False, file_error: type[BankoError] = InputFileError
) -> int:
    """The exit code of a command: 0 or what `work` returns; an error's own, told in one line; 130 after Ctrl-C.

    Args:
        debug: let errors through, with their tracebacks.
        file_error: what an error of the system about a file is; what a command writes has errors of its own.
    """
    open_streams()
    try:
        return work() or 0
    except BankoError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if debug:
            raise
        print(f"error: {told_by_the_system(error)}", file=sys.stderr)
        return file_error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def parse_seconds(text: str, option: str = "--budget") -> float:
    """Reads a duration, `600`, `90s` or `10m`, in seconds. Raises UsageError, naming the `option`, for all else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m)?", text.strip())
    seconds = float(match[1]) * (60 if match[2] == "m" else 1) if match else 0.0
    if seconds <= 0:
        raise UsageError(f"{option} {text!r} is not a duration: write seconds or minutes, as in 600, 90s or 10m")
    return seconds


def number_from(low: int) -> Callable[[str], int]:
    """An argparse type: whole numbers not below `low`."""

    def number(text: str) -> int:
        # Python itself reads and takes more: 1_000, digits of all scripts, and numbers no library can hold.
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < low:
            most = ", of 18 digits at most" * (len(text) > 18)
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {low} or more{most}")
        return int(text)

    return number


def batch_size(text: str) -> int | None:
    """An argparse type: a batch size; `auto` is None."""
    return None if text == "auto" else number_from(1)(text)


def devices(text: str) -> tuple[str | None, int | None]:
    """An argparse type: `auto`, a number, or `cpu:` and a number, as kind and number; None is whatever there is."""
    if text == "auto":
        return None, None
    kind, separator, count = text.rpartition(":")
    if kind != ("cpu" if separator else ""):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, a number such as 8, and cpu:2")
    return kind or None, number_from(1)(count)


def cluster(text: str) -> str:
    """An argparse type: the address of a Ray cluster."""
    if text != "auto" and not re.fullmatch(r"[^:/\s]+:[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor HOST:PORT, such as 10.0.0.1:6379")
    return text


def epoch(text: str) -> float:
    """An argparse type: a moment in Unix seconds."""
    if not re.fullmatch(r"[0-9]{1,18}(\.[0-9]*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a moment in Unix seconds, such as 1735689600.5")
    return float(text)


def guidance(text: str) -> tuple[float, float]:
    """An argparse type: a strength of guidance, `2.5`, or the range that each image's is drawn from, `1:3`."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)(?::(\d{1,6}(?:\.\d+)?))?", text)
    low, high = (float(found[1]), float(found[2] or found[1])) if found else (1.0, 0.0)
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number such as 2.5 nor a range such as 1:3")
    return low, high


def prompts(text: str) -> str | Path:
    """An argparse type: a style of prompts, or the path of a file of them."""
    if text in STYLES:
        return text
    if not text.endswith(".toml"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(STYLES)}, nor the path of a .toml file")
    return Path(text)

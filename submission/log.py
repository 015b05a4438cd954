"""What a person sees: a live line on a terminal, plain lines in a log, or JSON for machines."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import psutil
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from submission.plan.budget import Budget
from submission.streams import lost_output

LogStyle = Literal["plain", "rich", "json", "kept"]

# Seconds between progress lines where there is no terminal to redraw.
LINE_SECONDS = 5.0


@dataclass(frozen=True)
class Status:
    """Generation so far and as planned; `images_per_second` is the recent pace."""

    rounds: int
    planned_rounds: int
    ipc: int
    planned_ipc: int
    images: int
    planned_images: int
    images_per_second: float

    @property
    def done(self) -> float:
        return self.images

    @property
    def planned(self) -> float:
        return self.planned_images

    def __str__(self) -> str:
        return (
            f"round {self.rounds}/{self.planned_rounds}, IPC {self.ipc}/{self.planned_ipc}, "
            f"{self.images_per_second:,.1f} images/s"
        )


class Shown(Protocol):
    """What a line of progress shows: its words, and how much is done of what is planned. A dataclass, for JSON."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def done(self) -> float: ...

    @property
    def planned(self) -> float: ...


class Log:
    """Everything the job says, with the seconds since its start. Warnings are kept for the manifest.

    In style `kept` nothing is shown: pairs of "info" or "warning" and a text wait in `kept` for whoever passes them on.
    """

    def __init__(self, style: LogStyle, budget: Budget) -> None:
        self.style = style
        self.budget = budget
        self.kept: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.timings: dict[str, float] = {}
        self.spans: dict[str, tuple[float, float]] = {}
        self._last_line = -LINE_SECONDS
        self._bar: Progress | None = None
        if style == "rich":
            self._bar = Progress(
                SpinnerColumn("dots" if sys.stdout.encoding.lower().startswith("utf") else "line"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[figures]}"),
                _Resources(budget),
                console=Console(force_terminal=True),
            )
            self._bar.start()
            self._row = self._bar.add_task("starting", total=None, figures="")

    def say(self, text: str) -> None:
        self._emit("info", text)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
        self._emit("warning", text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what goes on, and adds its duration in seconds to `timings`. Its `spans` reach from when it first began
        to when it last ended, in seconds of the budget."""
        if self._bar:
            self._bar.update(self._row, description=name)
        began, started = self.budget.elapsed, time.perf_counter()
        yield
        self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - started
        self.spans[name] = (self.spans.get(name, (began,))[0], self.budget.elapsed)

    def add_phase(self, name: str, began: float) -> None:
        """Adds a phase that was not named while it lasted, from moment `began` of the budget until now."""
        self.timings[name], self.spans[name] = self.budget.elapsed - began, (began, self.budget.elapsed)

    def status(self, status: Shown) -> None:
        """Shows progress: at once on a terminal, every `LINE_SECONDS` in a log."""
        if self._bar:
            self._bar.update(self._row, completed=status.done, total=status.planned, figures=escape(str(status)))
        elif self.style != "kept" and self.budget.elapsed - self._last_line >= LINE_SECONDS:
            self._last_line = self.budget.elapsed
            if self.style == "json":
                self._print_json({"event": "progress", **asdict(status), "memory_bytes": _memory()})
            else:
                print(f"{self.budget.elapsed:7.1f}s  {status}, {_resources(self.budget)}", flush=True)

    def facts(self) -> dict[str, object]:
        """The log's part of the manifest. Safe while other threads log."""
        lost = lost_output()
        return {
            "phases_seconds": {name: round(seconds, 3) for name, seconds in list(self.timings.items())},
            "phases_from_to": {name: [round(end, 2) for end in span] for name, span in list(self.spans.items())},
            "warnings": self.warnings + [f"the log could not be written to its end ({lost})"] * bool(lost),
        }

    def close(self) -> None:
        if self._bar:
            self._bar.update(self._row, visible=False)
            self._bar.stop()

    def _emit(self, event: str, text: str) -> None:
        prefix = "warning: " if event == "warning" else ""
        if self.style == "kept":
            self.kept.append((event, text))
        elif self._bar:
            colour = "yellow" if prefix else "default"
            self._bar.console.print(f"[dim]{self.budget.elapsed:7.1f}s[/]  [{colour}]{prefix}{escape(text)}[/]")
        elif self.style == "json":
            self._print_json({"event": event, "text": text})
        else:
            print(f"{self.budget.elapsed:7.1f}s  {prefix}{text}", flush=True)

    def _print_json(self, content: dict[str, object]) -> None:
        print(json.dumps({"elapsed": round(self.budget.elapsed, 3), **content}), flush=True)


class _Resources(ProgressColumn):
    """Time left and memory, redrawn even while the job is busy."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def render(self, task: Task) -> Text:
        return Text(f"{_resources(self.budget)}", style="dim")


def default_style() -> LogStyle:
    return "rich" if sys.stdout.isatty() else "plain"


def _resources(budget: Budget) -> str:
    return f"{max(0.0, budget.left):.0f} s left, {_memory() / 1e9:.1f} GB"


def _memory() -> int:
    return int(psutil.Process().memory_info().rss)

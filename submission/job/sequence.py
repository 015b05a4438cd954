"""Tasks one after the other: each has its turn, with a budget, a guard and a log of its own, and in the end a line."""

import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from submission.errors import BankoError, BudgetError, OutputError, first_line, importing, told_by_the_system
from submission.log import Log, LogStyle
from submission.machine.memory import forget_peak, return_freed
from submission.plan.budget import Allowance, Budget
from submission.plan.guard import HUB_IS_LATE, Guard, hearing
from submission.tasks import Task

if TYPE_CHECKING:
    from submission.job.run import Prepare
    from submission.request import JobRequest

# A task whose turn does not come has the exit code of one that is told to stop before its first round.
NOT_BEGUN = BudgetError.exit_code


class Outcomes:
    """What came of every task: an exit code and a line, which is said in the end if there are several tasks.

    It has the `log` of the task at hand, and does what is left to do where a guard ends the process
    (`submission.plan.guard.Leaving`).
    """

    def __init__(self, tasks: Sequence[Task], log: Log) -> None:
        self.log = log
        self._names, self._at_hand = [task.name for task in tasks], tasks[0].name
        self._run_log = log  # which counts from the start of the run
        self._ended: dict[str, tuple[int, str]] = {}

    @property
    def several(self) -> bool:
        """Whether there are several tasks."""
        return len(self._names) > 1

    def turn(self, task: Task, log: Log) -> None:
        """From now on that task is at hand, and says what it does to that log."""
        self._at_hand, self.log = task.name, log

    def ended(self, task: Task, code: int, line: str) -> None:
        """That is what came of a task."""
        self._ended[task.name] = code, line

    def exit_code(self, code: int = 0) -> int:
        """That of the first task that failed, in the order in which they were asked for; `code` is that of the one at
        hand, unless it has ended."""
        return next((of_task for of_task, _ in self._all(code).values() if of_task), 0)

    def last_lines(self, code: int = 0) -> None:
        self.log.close()
        if self.several:
            for name, (_, line) in self._all(code).items():
                self._run_log.say(f"{name}: {line}")

    def _all(self, code: int) -> dict[str, tuple[int, str]]:
        rest = dict.fromkeys(self._names, (NOT_BEGUN, "not begun, because the run was over before its turn"))
        return rest | {self._at_hand: (code, f"ended with exit code {code}")} | self._ended


def run_in_turn(
    tasks: Sequence[Task],
    ask: Callable[[Log], Sequence["JobRequest"]],
    allowance: Allowance,
    style: LogStyle,
    prepare: "Prepare | None" = None,
    *,
    debug: bool = False,
) -> int:
    """Makes the files of all tasks, each safe before the next is begun, and returns the exit code.

    `ask` makes the requests, which takes the seconds of importing libraries. What would keep a later task from being
    made is found out before the first is begun. What fails for one keeps no other from being made; a signal does, and
    finishes the file at hand. With `debug` an error ends all, with its traceback.

    Raises UsageError, CheckpointError and OutputError, before the first task is begun.
    """
    budget, end = allowance.turn([len(task.classes) for task in tasks], allowance.start)
    log = Log(style, budget)
    outcomes = Outcomes(tasks, log)
    with hearing() as told:
        try:
            with Guard(budget, end, outcomes) as guard:
                with importing():
                    requests = ask(log)
                if len(requests) > 1 or requests[0].resume:
                    with guard.awaiting(HUB_IS_LATE):
                        requests = _look_ahead(requests, outcomes)
            for index, request in enumerate(requests):
                if index:
                    if told.is_set():
                        break
                    _forget_the_last()
                classes = [len(one.image.task.classes) for one in requests[index:]]
                budget, end = allowance.turn(classes, time.monotonic() if index else allowance.start)
                if budget != log.budget:
                    log.close()
                    log = Log(style, budget)
                outcomes.turn(request.image.task, log)
                _take_turn(request, budget, end, outcomes, told, prepare, debug=debug)
        finally:
            outcomes.log.close()
        outcomes.last_lines()
    return outcomes.exit_code()


def _look_ahead(requests: Sequence["JobRequest"], outcomes: Outcomes) -> Sequence["JobRequest"]:
    """Those that are to be made. Raises UsageError, CheckpointError and OutputError for what can be known of them."""
    from submission.job.checks import check_all, checkpoint_of_all, made_before  # noqa: PLC0415  # slow to import

    to_make, checkpoint = [], checkpoint_of_all(requests)
    for request in requests:
        ipc = made_before(request, checkpoint) if request.resume else None
        if ipc is None:
            to_make.append(request)
        else:
            line = f"{request.dataset}, IPC {ipc}, complete before this run and left as it is"
            outcomes.ended(request.image.task, 0, line)
            if not outcomes.several:
                outcomes.log.say(f"{line}: without --resume it is made anew")
    if to_make:
        check_all(to_make, checkpoint)
    return to_make


def _take_turn(
    request: "JobRequest",
    budget: Budget,
    end: Budget,
    outcomes: Outcomes,
    told: threading.Event,
    prepare: "Prepare | None",
    *,
    debug: bool,
) -> None:
    """Makes a task's file, or says why there is none."""
    try:
        with Guard(budget, end, outcomes) as guard:
            with importing():
                from submission.job.run import run  # noqa: PLC0415  # slow to import
            if told.is_set():  # before this guard was there to see to it
                raise BudgetError("stopped before the first round was done: nothing is written")
            extent = run(request, budget, outcomes.log, guard, prepare)
    except (BankoError, OSError) as problem:
        if debug:
            raise
        error = problem if isinstance(problem, BankoError) else OutputError(told_by_the_system(problem))
        outcomes.log.close()
        print(f"error: {error}", file=sys.stderr)
        outcomes.ended(request.image.task, error.exit_code, f"exit code {error.exit_code}: {error}")
    except Exception as problem:  # such as a device's; the other tasks are worth more than an end at once
        if debug or not outcomes.several:
            raise
        outcomes.log.close()
        traceback.print_exc()
        outcomes.ended(request.image.task, 1, f"exit code 1: {first_line(problem)}")
    else:
        line = f"{request.dataset}, IPC {extent.ipc}, {max(0.0, budget.left):.1f} s before its deadline"
        outcomes.ended(request.image.task, 0, line)


def _forget_the_last() -> None:
    """Gives back the memory of the task before, its model above all; the next one's peak is its own."""
    gc.collect()
    return_freed()
    forget_peak()

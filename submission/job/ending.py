"""The end of a job, whoever brings it about: the main thread as a rule, else the guard."""

import shlex
import signal
import sys

from submission.engine import Engine
from submission.errors import BankoError, BudgetError, as_word, first_line
from submission.job.files import JobFiles
from submission.log import Log
from submission.machine.disk import release
from submission.model.recipe import Sampling
from submission.plan.estimates import Composition
from submission.plan.planner import Planner
from submission.report.manifest import Digests
from submission.request import JobRequest
from submission.tasks import builtin_names

# What the report took on two busy CPU cores that had yet to read its libraries from the disk: so much is reserved for
# it where that is no more than the first share of the budget. Idle cores took a quarter of it (0.6 s for 100 classes):
# it is begun where the second share of it is left, and given up where it is not done in time.
REPORT_SECONDS, REPORT_SECONDS_PER_CLASS, REPORT_SHARE, REPORT_LEAST = 2.0, 0.005, 0.05, 0.4
# Seconds the last manifest may wait for the checkpoint's hashes, which were begun at the start.
HASH_PATIENCE = 0.5


class Ending:
    """Ends a job: what the guard calls (`submission.plan.guard.Duties`), and the main thread's last step."""

    def __init__(
        self,
        request: JobRequest,
        sampling: Sampling,
        engine: Engine,
        planner: Planner,
        files: JobFiles,
        digests: Digests,
        log: Log,
    ) -> None:
        self._request, self._sampling, self._engine, self._planner = request, sampling, engine, planner
        self._files, self._digests, self._log = files, digests, log
        self.complete = False
        self._report_under_way = ""

    def overdue(self) -> bool:
        return self._planner.overdue()

    def exit_code(self) -> int:
        return 0 if self._files.plan.in_place else BudgetError.exit_code

    def stopped_by(self, number: signal.Signals) -> None:
        if not self.complete:
            rounds = self._files.plan.rounds
            self._log.warn(f"told to stop ({number.name}): finishing the file with {rounds} rounds")

    def take_over(self) -> int:
        self._log.warn("generation does not come back in time: the file is finished without it")
        try:
            self.conclude()
        except BankoError as error:
            self._log.close()
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        return 0

    def last_words(self) -> None:
        self._files.freeze()
        extent, spool = self._files.plan.in_place, self._files.spool
        if self.complete:
            if self._report_under_way:
                self._log.say(self._report_under_way)
            release(self._request.output)
            return
        if extent is None:
            if not spool.count:
                spool.remove()
                release(self._request.output)
            self._log.close()
            print(f"error: {self._planner.too_small()}", file=sys.stderr)
            return
        self._log.warn(
            f"time is up: the last file is not done, the one in place stays (IPC {extent.ipc}, {extent.rounds} of "
            f"{spool.count} rounds)"
        )
        self._files.write_manifest()

    def conclude(self) -> None:
        """Ends the devices, so that the file has cores and memory; writes the last file and its manifest; removes the
        spool, unless the job was told to stop or had no time for all of it, and may be resumed.

        Raises BudgetError where there is no time for any file, and OutputError.
        """
        request, plan, spool, log = self._request, self._files.plan, self._files.spool, self._log
        self._engine.close(patience=0)
        with log.phase("write and verify"):
            self._files.write_last()
        if plan.in_place is None:
            raise self._planner.too_small()
        extent, ready = plan.in_place, plan.composition.ipc(spool.count)
        if extent.ipc < ready:
            log.warn(f"there was no time to write more than IPC {extent.ipc} of the {ready} that were ready")
        elif extent.ipc == plan.composition.cap < request.composition.cap:
            log.warn(f"there was no room to write more than IPC {extent.ipc} of the {request.composition.cap} allowed")
        with log.phase("sheet and manifest"):
            self._files.draw_sheet()
            if self._digests.wait(HASH_PATIENCE) is None:
                log.warn("the checkpoint's SHA-256 was not ready in time and is missing from the manifest")
            for file in self._digests.others():
                log.warn(f"{file} is another file than the model's recipe names: its SHA-256 is not the published one")
            self._files.write_manifest()
        copies = f"the rest {request.pda} copies" if extent.rounds < extent.ipc else "no copies"
        left = max(0.0, plan.budget.left)  # the deadline may be past where other tasks follow
        log.say(
            f"{request.dataset}: {plan.composition.classes} classes, IPC {extent.ipc} "
            f"({min(extent.rounds, extent.ipc)} generated, {copies}), {left:.1f} s before the deadline"
        )
        if unused := idle_time(self._planner, self._sampling, request.composition):
            log.say(unused)
        self.complete = True
        stopped = plan.budget.hurried and (plan.composition.pool or spool.count < plan.composition.cap)
        if stopped or extent != plan.whole:
            log.say(f"its {spool.count} rounds are kept in {spool.folder}: --resume goes on from them")
        else:
            spool.remove()
        self._report()
        release(request.output)
        log.close()

    def _report(self) -> None:
        """The page about the run, where there is time for it; the job is complete with or without it."""
        dataset, budget, log = self._request.dataset, self._planner.budget, self._log
        task = self._request.image.task.name
        of_task = [] if task in builtin_names() else ["--task", f"{task}.toml"]
        command = shlex.join(["./run.sh", "report", as_word(dataset.with_suffix(".json")), *of_task])
        later = f"{command} makes it"
        no_time = f"no time for the report: {later}"
        if budget.usable - budget.exit_reserve < REPORT_LEAST * report_seconds(self._files.plan.composition.classes):
            log.say(no_time)
            return
        self._report_under_way = no_time
        try:
            from submission.report.page import write_report  # noqa: PLC0415  # its libraries are slow to import

            page = write_report(dataset, self._request.image.task)
        except Exception as error:  # noqa: BLE001  of any class: the user's interpreter, or a matplotlibrc
            log.warn(f"no report ({first_line(error)}): {later}")
        else:
            log.say(f"{page}: what happened, written {budget.left:.1f} s before the deadline")
        self._report_under_way = ""


def idle_time(planner: Planner, sampling: Sampling, wanted: Composition) -> str | None:
    """What would have fitted into the time left, where there is much of it: more images or, of a model that more steps
    help, better ones. None where the disk has no room for what was wanted."""
    fewer = planner.file_plan.composition.most_rounds < wanted.most_rounds
    if fewer or not (room := planner.would_fit()):
        return None
    rounds, times = room
    option = "--pool" if planner.file_plan.composition.pool else "--max-ipc"
    steps = min(sampling.most_steps, int(times * (sampling.count or 1)))
    better = f", or --steps {steps}" if steps > (sampling.count or 1) else ""
    return f"{planner.budget.usable:.0f} s were not needed: {option} {_rounded(rounds)}{better} would have fitted"


def _rounded(number: int) -> int:
    """Down to two digits that count."""
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return number // unit * unit


def report_seconds(classes: int) -> float:
    """What the report on so many classes may take."""
    return REPORT_SECONDS + REPORT_SECONDS_PER_CLASS * classes

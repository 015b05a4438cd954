"""The ranks of a job, as one of them sees the others: signs of life, reports, and who writes the files.

Nobody waits for an answer. Every rank leaves a report in the spool folder, twice a second, which is its sign of life.
The writer adds up what all have done; the others read its report and so know as much as it does, should they have to
go on in its place.

The writer of term t is the rank that made the file `writer-t`, which only one can. When its reports stay the same, the
lowest rank that still shows signs of life makes the next one, and removes whatever files the old one was about to put
in place. One that was only stopped finds itself replaced before it puts any there (`check`), or finds them removed.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from submission.budget import Scheduler
from submission.dataset_file import AbandonedError
from submission.estimates import Extent, FileCost
from submission.output_folder import is_at, remove_unfinished
from submission.progress import Log
from submission.ranks import Place
from submission.rounds import Spool

# Seconds between two reports, and two looks at those of others.
BEAT = 0.5
# Looks at the same report after which its rank is taken to be gone. Counted in looks, so that one that was itself
# stopped for a while does not take it for the others' silence.
SILENT_LOOKS = 6


class Crew:
    """This rank among the others.

    `writing`: whether it writes the files. `over`: set when the job has been finished by another. `done`: to be set
    when this rank makes no more rounds. `at_work`: how many other ranks still do; known to the writer.
    """

    def __init__(self, place: Place, output: Path, task: str, spool: Spool, log: Log) -> None:
        self.place = place
        self.writing = place.ranks == 1
        self.over = threading.Event()
        self.done = False
        self.at_work = 0
        self.reports: dict[int, dict[str, Any]] = {}
        self.scheduler: Scheduler | None = None
        self._output, self._task, self._spool, self._log = output, task, spool, log
        self._term, self._writer, self._claim = 0, -1, -1
        self._beat, self._inherited = 0, dict[str, Any]()
        self._same_looks = dict.fromkeys(range(place.ranks), 0)
        self._named: set[int] = set()
        self._finished = False
        self._reporting = threading.Lock()

    def start(self) -> None:
        """Begins to report and to look, on threads of its own, where there are others."""
        if self.place.ranks > 1:
            threading.Thread(target=self._every_beat, args=(self._watch,), name="crew", daemon=True).start()
            # Where the disk is busy, this may wait for seconds.
            threading.Thread(target=self._every_beat, args=(self._spool.sync,), name="sync", daemon=True).start()

    def follow(self, scheduler: Scheduler) -> None:
        """Keeps the scheduler informed of the others from now on."""
        self.scheduler = scheduler
        self._learn(self._inherited)
        self._count()

    def silent(self) -> list[int]:
        """The other ranks that show no sign of life, as far as this one has looked."""
        return [rank for rank, looks in self._same_looks.items() if looks >= SILENT_LOOKS]

    def warnings(self) -> list[str]:
        """What the other ranks have warned of, with who they are."""
        reports = sorted(self.reports.copy().items())
        return [f"rank {rank}: {text}" for rank, report in reports for text in report.get("warnings", ())]

    def replaced(self) -> bool:
        """Whether another rank is the writer by now."""
        if self.place.ranks == 1:
            return False
        # The file itself, not its name: another job may be in the folder by now.
        if self._claimed(self._term + 1).exists() or not is_at(self._claimed(self._term), self._claim):
            self.writing = False
        return not self.writing

    def check(self) -> None:
        """To be called just before a file is put in place. Raises AbandonedError where this rank has been replaced."""
        if self.replaced():
            raise AbandonedError

    def look(self) -> None:
        """Takes in what the others have done by now. Raises OSError."""
        if self.place.ranks > 1:
            self._spool.look()
        self._count()

    def finish(self) -> None:
        """Tells the others that the job is finished."""
        self._finished = True
        self.report()

    def report(self) -> None:
        """Tells the others at once what they would hear with the next beat, which warns where it cannot be told."""
        if self.place.ranks > 1:
            with suppress(OSError):
                self._report()

    def _watch(self) -> None:
        self._report()
        self._find_writer()
        if self.writing:
            self._look_around()
        elif not self._silent(self._writer):
            self._learn(self.reports[self._writer])
        elif all(self._silent(rank) for rank in range(self.place.rank)):
            self._take_over()

    def _every_beat(self, work: Callable[[], None]) -> None:
        while not self.over.is_set():
            try:
                work()
            except OSError as error:
                if self.over.is_set() or not self._spool.folder.exists():
                    self.at_work = 0
                    self.over.set()
                    return
                text = f"the other ranks cannot be seen or told of anything ({error.strerror})"
                if text not in self._log.warnings:
                    self._log.warn(text)
            time.sleep(BEAT)

    def _report(self) -> None:
        with self._reporting:
            self._beat += 1
            report: dict[str, object] = {"beat": self._beat, "done": self.done, "warnings": self._log.warnings}
            if self.writing and self.scheduler:
                report |= _knowledge(self.scheduler) | {"finished": self._finished}
            scratch = self._spool.folder / f".rank-{self.place.rank}"
            scratch.write_text(json.dumps(report))
            scratch.replace(self._spool.folder / f"rank-{self.place.rank}.json")

    def _silent(self, rank: int) -> bool:
        """Has another look at a rank's report: whether it has stayed the same for too long. Rank -1 is nobody."""
        if rank < 0:
            return True
        try:
            report = json.loads((self._spool.folder / f"rank-{rank}.json").read_text())
        except FileNotFoundError:
            report = {}
        news = report.get("beat") != self.reports.get(rank, {}).get("beat")
        self._same_looks[rank] = 0 if news else self._same_looks[rank] + 1
        self.reports[rank] = report
        return self._same_looks[rank] >= SILENT_LOOKS

    def _claimed(self, term: int) -> Path:
        return self._spool.folder / f"writer-{term}"

    def _find_writer(self) -> None:
        while (claim := self._claimed(self._term + 1)).exists():
            before, self._writer, self._term = self._writer, int(claim.read_text()), self._term + 1
            if before == self.place.rank:
                self.writing = False
                self._log.warn(f"rank {self._writer} writes the files by now: this one was taken to be gone")
                self._log.quiet = True

    def _take_over(self) -> None:
        claim, scratch = self._claimed(self._term + 1), self._spool.folder / f".writer-{self.place.rank}"
        scratch.write_text(str(self.place.rank))
        try:
            os.link(scratch, claim)  # with its content, and only where there is none
        except FileExistsError:
            return  # another was faster
        finally:
            scratch.unlink()
        self._claim = os.open(claim, os.O_RDONLY)
        before, self._writer, self._term = self._writer, self.place.rank, self._term + 1
        remove_unfinished(self._output, self._task)
        self._log.quiet = False
        if before >= 0:
            self._inherited = self.reports[before]
            self._learn(self._inherited)
            self._log.warn(f"rank {before} shows no sign of life: rank {self.place.rank} writes the files from now on")
        self._look_around()
        self.writing = True

    def _look_around(self) -> None:
        """What a writer wants to know of the others."""
        for rank in range(self.place.ranks):
            if rank == self.place.rank:
                continue
            if not self._silent(rank):
                if rank in self._named:
                    self._named.remove(rank)
                    self._log.say(f"rank {rank} is back")
            elif rank not in self._named:
                self._named.add(rank)
                rounds = self._spool.by_rank().get(rank, 0)
                self._log.warn(f"rank {rank} shows no sign of life; its {rounds} rounds so far count")
        self.at_work = sum(not report.get("done") for rank, report in self.reports.items() if rank not in self._named)
        self.look()

    def _count(self) -> None:
        if self.scheduler:
            others = sum(count for rank, count in self._spool.by_rank().items() if rank != self.place.rank)
            self.scheduler.elsewhere = len(self._spool.before) + others
            self.scheduler.ranks = 1 + self.at_work

    def _learn(self, report: Mapping[str, Any]) -> None:
        """Takes on what the writer knows."""
        scheduler = self.scheduler
        if scheduler and "rounds" in report:
            own = scheduler.images // scheduler.shape.classes
            scheduler.elsewhere = max(scheduler.elsewhere, report["rounds"] - own)
            scheduler.ranks = report["ranks"]
            scheduler.cost, scheduler.spent = FileCost(**report["cost"]), report["spent"]
            scheduler.in_place = Extent(*report["in_place"]) if report["in_place"] else None
        if report.get("finished"):
            self.over.set()


def _knowledge(scheduler: Scheduler) -> dict[str, object]:
    """What a successor has to know."""
    extent = scheduler.in_place
    return {
        "rounds": scheduler.rounds,
        "ranks": scheduler.ranks,
        "in_place": [extent.rounds, extent.ipc] if extent else None,
        "spent": scheduler.spent,
        "cost": asdict(scheduler.cost),
    }

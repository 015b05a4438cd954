"""The files of a job: written from its spool, put in place, and described beside."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from submission.dataset.dataset_file import AbandonedError, write_dataset
from submission.dataset.rounds import Spool
from submission.errors import OutputError
from submission.job.snapshots import SnapshotWriter
from submission.log import Log
from submission.machine.disk import write_json, write_whole
from submission.plan.estimates import Extent
from submission.plan.file_plan import FilePlan
from submission.report.contact_sheet import MOST_CLASSES, draw_contact_sheet
from submission.request import JobRequest

# The manifest of a file.
Describe = Callable[[Extent], Mapping[str, object]]


class JobFiles:
    """Dataset, contact sheet and manifest in the output folder.

    Manifest and dataset agree at any moment: a lock is held while a dataset is put in place, and while the manifest of
    the one in place is written.
    """

    def __init__(self, request: JobRequest, spool: Spool, plan: FilePlan, describe: Describe, log: Log) -> None:
        self.spool, self.plan = spool, plan
        self._request, self._describe, self._log = request, describe, log
        self._writer = SnapshotWriter()
        self._placing = threading.RLock()
        self._sheet_drawn = False

    @property
    def writing(self) -> bool:
        """Whether a snapshot is being written."""
        return self._writer.busy

    def keep_up(self) -> None:
        """Takes what a finished snapshot cost into the plan, and begins the next where one is due. Raises
        OutputError."""
        self._collect()
        if not self.writing and (extent := self.plan.due()) is not None:
            self._check_folder()
            self._writer.start(
                self._request.dataset,
                self.spool.read().first(extent.rounds),
                self._request.file_spec(extent),
                extent,
                self._in_place(extent),
                self.describe,
            )

    def write_last(self) -> None:
        """Writes the last file, if there is more than in the one in place and time for it. Where it turns out too slow,
        it is given up for a smaller one. Raises OutputError."""
        plan, request = self.plan, self._request
        self._writer.abandon()
        self._collect()
        self._check_folder()
        while (extent := plan.last_file()) is not None and not plan.budget.late():
            began = plan.budget.elapsed

            def check(fraction: float, extent: Extent = extent, began: float = began) -> None:
                if plan.too_slow(extent, began, fraction):
                    raise AbandonedError

            rounds = self.spool.read().first(extent.rounds)
            try:
                write_dataset(request.dataset, rounds, request.file_spec(extent), check, placing=self._in_place(extent))
            except AbandonedError:
                self._log.warn(f"writing IPC {extent.ipc} would end after the deadline: given up")

    def describe(self) -> None:
        """Contact sheet and manifest of the file in place. Raises OutputError."""
        self._draw_sheet()
        self.write_manifest()

    def write_manifest(self) -> None:
        """The manifest of the file in place, if there is one. Raises OutputError."""
        with self._placing:
            if (extent := self.plan.in_place) is not None:
                write_json(self._request.dataset.with_suffix(".json"), self._describe(extent))

    def freeze(self) -> None:
        """From here on neither dataset nor manifest changes, but by the calling thread."""
        self._placing.acquire()

    def abandon(self) -> None:
        """Gives up a snapshot that is being written."""
        self._writer.abandon()

    @contextmanager
    def _in_place(self, extent: Extent) -> Iterator[None]:
        """While the file of `extent` is put in place: nobody writes a manifest until it is known to be there."""
        with self._placing:
            yield
            self.plan.placed(extent)

    def _collect(self) -> None:
        """Tells the plan of a snapshot that was finished meanwhile. Raises OutputError where it failed."""
        try:
            done = self._writer.collect()
        except OutputError:
            if self._request.output.is_dir():
                raise
            self._check_folder()
            return
        if done is not None:
            self.plan.wrote(done.extent, done.seconds, done.spent)

    def _check_folder(self) -> None:
        """Sees whether the file in place is still there. The output folder is made again where someone has removed it:
        the rounds survive in the open spool. Raises OutputError."""
        folder, dataset = self._request.output, self._request.dataset
        if folder.is_dir() and (self.plan.in_place is None or dataset.exists()):
            return
        self._log.warn(f"{dataset if folder.is_dir() else folder} was removed while the job ran: made anew")
        self.plan.removed()
        self._sheet_drawn = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make {folder} again ({error.strerror})") from error

    def _draw_sheet(self) -> None:
        """The contact sheet, of the first round, once."""
        if not self._sheet_drawn:
            classes = self._request.image.task.classes[:MOST_CLASSES]
            images = self.spool.read()[np.zeros(len(classes), np.int64), np.arange(len(classes))]
            sheet = draw_contact_sheet(images, [c.name for c in classes])
            write_whole(self._request.dataset.with_suffix(".png"), sheet)
            self._sheet_drawn = True

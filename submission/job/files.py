"""The files of a job: written from its spool, put in place, and described beside."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from submission.dataset.dataset_file import AbandonedError, write_dataset
from submission.dataset.rounds import Chosen, Spool
from submission.errors import OutputError
from submission.job.snapshots import SnapshotWriter
from submission.log import Log
from submission.machine.disk import room, write_json, write_whole
from submission.plan.estimates import Composition, Extent
from submission.plan.file_plan import FilePlan
from submission.report.contact_sheet import MOST_CLASSES, draw_contact_sheet
from submission.request import JobRequest

# The part of a disk's free space that the job may plan to fill.
USABLE_ROOM = 0.95


def composition_that_fits(request: JobRequest, spool: Spool, log: Log) -> Composition:
    """What was asked for, with a cap that the disk has room for; says how much of it that takes. Raises OutputError."""
    wanted, of_each = request.composition, bytes_per_ipc(request)
    of_round = wanted.classes * 3 * request.image.task.size**2
    free = room(request.output) + spool.count * of_round
    fitting = int(USABLE_ROOM * free / of_each)
    if fitting < 1:
        raise no_room([request], free)
    cap = min(wanted.cap, fitting)
    beyond = min(max(0, wanted.pool - cap), int((USABLE_ROOM * free - cap * of_each) / of_round))
    bounded = f", all there is room for of the {wanted.cap} allowed" if cap < wanted.cap else ""
    chosen = f" chosen from up to {cap + beyond}" if beyond else ""
    log.say(
        f"disk: at most {(cap * of_each + beyond * of_round) / 1e9:,.2f} GB in {request.output}, where "
        f"{free / 1e9:,.2f} GB are free, for IPC {cap}{bounded}{chosen}"
    )
    return replace(wanted, cap=cap, pool=cap + beyond if beyond else 0)


def check_place(request: JobRequest) -> None:
    """Raises OutputError where a folder stands in the place of a file; the report is worth no job."""
    for file in map(request.dataset.with_suffix, (".pt", ".json", ".png")):
        if file.is_dir():
            raise OutputError(f"{file} is a folder: rename it, or choose another --output")


def bytes_per_ipc(request: JobRequest) -> int:
    """Bytes on the disk for one image per class: in the spool, in the file in place, and in the next one, which
    replaces it when it is whole."""
    task, dtype = request.image.task, getattr(torch, request.dtype)
    return len(task.classes) * 3 * task.size**2 * (1 + 2 * int(dtype.itemsize))


def no_room(requests: Sequence[JobRequest], free: float) -> OutputError:
    """Says that the files of all these do not fit into what is free in their folder, and what to do."""
    names = " and ".join(request.image.task.name for request in requests)
    needed = sum(map(bytes_per_ipc, requests))
    return OutputError(
        f"no room in {requests[0].output}: one image per class of {names} takes {needed / 1e6:,.2f} MB there, and "
        f"{free / 1e6:,.2f} MB are free: make room, or choose another --output"
    )


@dataclass(frozen=True)
class Choice:
    """Images for the last file: those of each class `chosen` from a `pool` of so many rounds or more, or what they were
    `moved` to by so many `steps` of sharpening, uint8 [IPC, classes, 3, size, size]."""

    chosen: Chosen
    pool: int
    moved: NDArray[np.uint8] | None = None
    steps: int = 0

    @property
    def images(self) -> Chosen | NDArray[np.uint8]:
        return self.chosen if self.moved is None else self.moved

    def examples(self, count: int) -> dict[str, NDArray[np.uint8]]:
        """A few of the first class's images, and those made first that were passed over."""
        places, label = np.arange(min(count, len(self.chosen))), np.zeros(count, np.int64)
        strips = {"chosen": self.chosen[places, label[: len(places)]]}
        if self.moved is not None:
            strips["sharpened"] = self.moved[places, 0]
        others = np.setdiff1d(np.arange(len(self.chosen.pool)), self.chosen.numbers[:, 0])[:count]
        return strips | {"passed over": self.chosen.pool[others, label[: len(others)]]}


class JobFiles:
    """Dataset, contact sheet and manifest in the output folder.

    Manifest and dataset agree at any moment: a lock is held while a dataset is put in place, and while the manifest of
    the one in place is written.
    """

    def __init__(
        self,
        request: JobRequest,
        spool: Spool,
        plan: FilePlan,
        manifest_of: Callable[[Extent], Mapping[str, object]],
        log: Log,
    ) -> None:
        self.spool, self.plan = spool, plan
        self._request, self._manifest_of, self._log = request, manifest_of, log
        self._writer = SnapshotWriter()
        self._placing = threading.RLock()
        self._adopted = False  # what lies beside the file in place is that of the run which made it
        self._sheet_drawn = False
        self._choice: Choice | None = None
        self.chosen: Choice | None = None  # that the file in place holds

    @property
    def writing(self) -> bool:
        """Whether a snapshot is being written."""
        return self._writer.busy

    def adopt(self, extent: Extent) -> None:
        """A run before has left a file of that extent, which only a better one is to replace."""
        self.plan.placed(extent)
        self._adopted = True

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
                self._describe,
            )

    def take(self, choice: Choice) -> None:
        """The last file is to hold these."""
        self._choice = choice

    def write_last(self) -> None:
        """Writes the last file, if there is more than in the one in place, or a choice, and time for it. Where it turns
        out too slow, it is given up for a smaller one. Raises OutputError."""
        plan, request, choice = self.plan, self._request, self._choice
        self._writer.abandon()
        self._collect()
        self._check_folder()
        while (extent := plan.last_file(chosen=choice is not None)) is not None and not plan.budget.late():
            began = plan.budget.elapsed

            def check(fraction: float, extent: Extent = extent, began: float = began) -> None:
                if plan.too_slow(extent, began, fraction):
                    raise AbandonedError

            if extent != plan.whole:
                choice = None  # which is of all images that there was to be time for
            pool = self.spool.read()
            images = choice.images if choice else pool.first(extent.rounds)
            try:
                placing = self._in_place(extent, choice)
                write_dataset(request.dataset, images, request.file_spec(extent), check, placing=placing)
            except AbandonedError:
                self._log.warn(f"writing IPC {extent.ipc} would end after the deadline: given up")
            choice = None

    def draw_sheet(self) -> None:
        """The contact sheet, of the first round or the first images chosen, once for each. Raises OutputError."""
        if not self._adopted and not self._sheet_drawn:
            classes = self._request.image.task.classes[:MOST_CLASSES]
            labels = np.arange(len(classes))
            images = self.chosen.images if self.chosen else self.spool.read()
            examples = self.chosen.examples(len(classes)) if self.chosen else {}
            strips = {f"{classes[0].name}, {how}": some for how, some in examples.items()}
            sheet = draw_contact_sheet(images[np.zeros_like(labels), labels], [c.name for c in classes], strips)
            write_whole(self._request.dataset.with_suffix(".png"), sheet)
            self._sheet_drawn = True

    def write_manifest(self) -> None:
        """The manifest of the file in place, if there is one. Raises OutputError."""
        with self._placing:
            if not self._adopted and (extent := self.plan.in_place) is not None:
                write_json(self._request.dataset.with_suffix(".json"), self._manifest_of(extent))

    def freeze(self) -> None:
        """From here on neither dataset nor manifest changes, but by the calling thread."""
        self._placing.acquire()

    def abandon(self) -> None:
        """Gives up a snapshot that is being written."""
        self._writer.abandon()

    def _describe(self) -> None:
        """What lies beside a snapshot that was put in place."""
        self.draw_sheet()
        self.write_manifest()

    @contextmanager
    def _in_place(self, extent: Extent, choice: Choice | None = None) -> Iterator[None]:
        """While the file of `extent` is put in place: nobody writes a manifest until it is known to be there."""
        with self._placing:
            yield
            self.plan.placed(extent)
            self._adopted = False
            if choice is not self.chosen:
                self.chosen, self._sheet_drawn = choice, False

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
        self.plan.placed(None)
        self._adopted = self._sheet_drawn = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make {folder} again ({error.strerror})") from error

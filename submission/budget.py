"""The deadline clock and the plan. Pure Python: seconds in, decisions out.

The rule behind everything here: at any moment, attempt the largest whole number of rounds whose remaining images,
at a cautious pace, and whose file, at its cautious cost, still fit into the time left.
"""

import math
import re
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from submission.batch_size import BatchSize
from submission.errors import BudgetError, UsageError
from submission.estimates import Extent, FileCost, Pace

# Seconds and share of the budget kept back for what comes after the last file: manifest, exit, surprises.
CLOSING_SECONDS, CLOSING_SHARE = 0.5, 0.003
# With less than this left, nothing is waited for any more: what is on disk has to do. A process with much memory or a
# GPU takes its time to go.
LAST_SECONDS, LAST_SHARE = 0.4, 0.0015
# Seconds in which a job that was told to stop is gone: containers are given ten.
GRACE_SECONDS = 6.5
# A snapshot is due when the rounds have grown by the factor since the last one, and all of them together take no more
# from generation than the share: of the time so far for a small step, of the whole budget for a large one, and of the
# whole budget for the last, which is made with `LAST_STEP_AT` of it left: it has to do where the disk is too slow
# for the last file. They may take 3% in all; the rest is for what their estimates lack.
SMALL_STEP, SMALL_STEP_SHARE = 1.25, 0.004
LARGE_STEP, LARGE_STEP_SHARE = 2.5, 0.006
LAST_STEP, LAST_STEP_SHARE, LAST_STEP_AT = 1.05, 0.022, 0.08
# Where that does not pay for all there is, a part will do that is so much better than the one in place.
LAST_PART = 1.5
# What a snapshot gets of a core that generation wants, too.
SNAPSHOT_CORE = 0.25
# While the last file is written, what was expected of it counts as if so much of it were seen: its first moments say
# little. It is given up only for one so much better than the one in place.
WATCH_TRUST, WATCH_GAIN = 0.15, 1.1
# Batches measured before a budget is called too small: the first ones are slow.
BATCHES_BEFORE_GIVING_UP = 3
# Times as fast as the fastest batch so far that larger ones may yet be, while their size is still sought.
BATCH_HOPE = 4.0
# A batch that takes this many times as long as expected, and this many seconds longer, is an outage and no pace.
STALL_FACTOR, STALL_SECONDS = 5.0, 1.0
# Other ranks are waited for while the last file could take so many times as long as it cautiously should.
WAIT_FACTOR = 2.0
# Seconds that the last file is begun earlier than usual where the batch before it does not come back.
STALL_RESERVE = 1.0


def parse_seconds(text: str, option: str = "--budget") -> float:
    """Reads a duration, `600`, `90s` or `10m`, in seconds. Raises UsageError, naming the `option`, for all else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m)?", text.strip())
    seconds = float(match[1]) * (60 if match[2] == "m" else 1) if match else 0.0
    if seconds <= 0:
        raise UsageError(f"{option} {text!r} is not a duration: write seconds or minutes, as in 600, 90s or 10m")
    return seconds


@dataclass
class Budget:
    """A span of time with a deadline, on a clock that never jumps.

    `seconds` from start to deadline; `start` is a reading of `clock`, which counts seconds monotonically.
    """

    seconds: float
    start: float
    clock: Callable[[], float] = time.monotonic

    @property
    def elapsed(self) -> float:
        return self.clock() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed

    def began(self, epoch: float) -> None:
        """The job had begun at `epoch` (Unix seconds), if that is earlier: another process of it says so."""
        self.start = min(self.start, self.clock() - (time.time() - epoch))

    @property
    def last(self) -> float:
        """Seconds before the deadline at which the process has to go, whatever it is doing."""
        return LAST_SECONDS + LAST_SHARE * self.seconds


def start_budget(seconds: float, *epochs: float | None) -> Budget:
    """The budget that began at the earliest of `epochs` (Unix seconds; None and the future are passed over).

    The wall clock is read once, here; from now on only the monotonic clock counts.
    """
    now = time.time()
    return Budget(seconds, time.monotonic() - (now - min([now, *(e for e in epochs if e is not None)])))


@dataclass(frozen=True)
class Shape:
    """How rounds become images a class (IPC).

    `classes` images a round, at most `copies` augmented copies an image, at most `cap` images a class.
    """

    classes: int
    copies: int
    cap: int

    def ipc(self, rounds: int) -> int:
        return min(self.cap, rounds * (1 + self.copies))

    def extent(self, rounds: int) -> Extent:
        """The file of so many rounds with all their copies."""
        return Extent(rounds, self.ipc(rounds))


@dataclass(frozen=True)
class Plan:
    """So many rounds in all, so many images a class, so many seconds still to generate and then to finish."""

    rounds: int
    ipc: int
    generate: float
    finish: float


def make_plan(
    left: float,
    images_done: int,
    batch_size: int,
    pace: Pace,
    finish: Callable[[Extent], float],
    shape: Shape,
    ranks: int = 1,
) -> Plan:
    """The largest plan that fits into `left` seconds, given `images_done` so far, counted across rounds, with so many
    ranks at the same pace.

    `finish` says how many seconds to keep for a file. The plan's `rounds` never lie below the whole rounds already
    done; equal to them means: stop generating, finish now.
    """

    def generate(rounds: int) -> float:
        return pace.bound(max(0, rounds * shape.classes - images_done) / ranks, batch_size)

    def total(rounds: int) -> float:
        return generate(rounds) + finish(shape.extent(rounds))

    done = images_done // shape.classes
    beyond = range(done + 1, max(shape.cap, done) + 1)
    rounds = done + bisect_right(beyond, left, key=total)
    return Plan(rounds, shape.ipc(rounds), generate(rounds), finish(shape.extent(rounds)))


@dataclass
class Scheduler:
    """Measures and decides: the size of the next batch, when a snapshot is due, when to stop, what to write last.

    It goes on while the fastest pace seen, or to be hoped of larger batches, could still complete a round (trying costs
    nothing) and the cautious pace leaves time to write what is there. `in_place` is what the file on disk holds,
    `spent` the seconds that snapshots have taken from generation.

    `afterwards` are the seconds kept for what is made of the last file when it is in place, and given up for the file
    where need be.

    `images` and the pace are this rank's, which makes `share` rounds at most; `elsewhere` are the rounds of the others
    and of a run before, and `ranks` are at work, this one among them, and taken to be as fast.
    """

    budget: Budget
    shape: Shape
    cost: FileCost
    batch: BatchSize
    pace: Pace = field(default_factory=Pace)
    fastest: float = math.inf
    images: int = 0
    share: float = math.inf
    elsewhere: int = 0
    ranks: int = 1
    batches: int = 0
    in_place: Extent | None = None
    spent: float = 0.0
    stalled: bool = False
    batch_began: float = 0.0
    batch_expected: float = 0.0
    hurried_end: float = math.inf
    afterwards: float = 0.0

    @property
    def rounds(self) -> int:
        """Whole rounds done, by all."""
        return self.elsewhere + self.images // self.shape.classes

    @property
    def total_images(self) -> int:
        """Images done, by all: of others, those in whole rounds."""
        return self.elsewhere * self.shape.classes + self.images

    @property
    def left(self) -> float:
        """Seconds to the deadline, or to the end of the grace that a signal left."""
        return min(self.budget.left, self.hurried_end - self.budget.elapsed)

    def hurry(self) -> None:
        """The job was told to stop."""
        self.hurried_end = min(self.hurried_end, self.budget.elapsed + GRACE_SECONDS)

    @property
    def closing(self) -> float:
        """Seconds that should still be left when the last file is in place."""
        if math.isfinite(self.hurried_end):
            return CLOSING_SECONDS
        return CLOSING_SECONDS + CLOSING_SHARE * self.budget.seconds + self.afterwards

    @property
    def last(self) -> float:
        """Seconds left at which the process has to go, whatever it is doing."""
        return LAST_SECONDS if math.isfinite(self.hurried_end) else self.budget.last

    def finish(self, extent: Extent) -> float:
        """Cautious seconds from the last image of such a file to the deadline."""
        return self.cost.bound(extent) + self.closing

    def next_batch(self) -> int:
        """How many images to generate next, 0 where it is time to write. Raises BudgetError if no round can be done."""
        size = self._next_batch()
        self.batch_began, self.batch_expected = self.budget.elapsed, self.pace.bound(size, self.batch.current)
        return size

    def _next_batch(self) -> int:
        classes = self.shape.classes
        wanted = min(self.share * classes - self.images, self.shape.cap * classes - self.total_images)
        full = int(min(self.batch.current, max(wanted, 0)))
        if self.rounds == 0 and self.batches < BATCHES_BEFORE_GIVING_UP:
            return full
        if not self.batches:  # the rounds are others': there is no pace yet
            return full if self.finish(self.shape.extent(self.rounds)) <= self.left else 0
        missing = classes - self.images % classes
        fastest = self.fastest if self.batch.settled else self.fastest / BATCH_HOPE
        hopeful = fastest * missing + self.finish(self.shape.extent(self.rounds + self.ranks))
        for size in (full, min(full, missing)):
            own, others = (self.images + size) // classes, (self.ranks - 1) * math.ceil(size / classes)
            after = self.shape.extent(self.elsewhere + own + others)
            cautious = self.pace.bound(size, self.batch.current) + self.finish(after)
            if max(hopeful, cautious) <= self.left:
                return size
        if self.rounds == 0:
            raise self.too_small()
        return 0

    def observe(self, images: int, seconds: float, *, disturbed: bool = False) -> bool:
        """Takes a batch that is done: how many images, and how long they took. True where it was an outage.

        One outage says nothing of the pace; two in a row are a new pace. A batch `disturbed` by a snapshot in the
        making says nothing of its size.
        """
        self.images += images
        self.batches += 1
        self.fastest = min(self.fastest, seconds / images)
        expected = images * self.pace.mean
        outage = self.pace.batches > 0 and seconds > max(STALL_FACTOR * expected, expected + STALL_SECONDS)
        self.stalled, repeated = outage, self.stalled
        if outage and not repeated:
            return True
        if not self.batch.settled:
            if not disturbed:
                self.batch.observe(seconds, self.left)
            self.pace = Pace(mean=self.fastest, batches=1)
        elif images == self.batch.current:  # a smaller one would look slow: every batch has a fixed cost
            self.pace.observe(images, seconds)
        return outage

    def snapshot(self) -> Extent | None:
        """What to write now beside generation, if anything: the first round at once, then larger files as they pay."""
        extent = self.shape.extent(self.rounds)
        if not self.rounds or self.in_place is None:
            return extent if self.rounds else None
        growth = extent.rounds / self.in_place.rounds
        if self._takes(extent) + LAST_STEP_AT * self.budget.seconds > self.left and growth >= LAST_STEP:
            fund = LAST_STEP_SHARE * self.budget.seconds
            if self.spent + self.cost.bound(extent) > fund:
                extent = self._part(self._fitting(fund - self.spent))
                if extent.ipc < LAST_PART * self.in_place.ipc:
                    return None
        elif growth >= LARGE_STEP:
            fund = LARGE_STEP_SHARE * self.budget.seconds
        elif growth >= SMALL_STEP:
            fund = SMALL_STEP_SHARE * self.budget.elapsed
        else:
            return None
        # One that could not be finished in time would be abandoned for the last file.
        in_time = self._takes(extent) <= self.left - self.finish(self.shape.extent(self.rounds))
        return extent if in_time and self.spent + self.cost.bound(extent) <= fund else None

    def wrote(self, extent: Extent, seconds: float, spent: float) -> None:
        """Takes a snapshot that is in place: what it would have taken alone, and what it took from generation."""
        self.in_place = extent
        self.spent += spent
        self.cost.observe(extent, seconds)

    def last_file(self) -> Extent | None:
        """What to write last: all there is if it is expected to fit, else what surely does; None where the file in
        place is no worse. With none in place, it is tried whatever the time."""
        extent = self.shape.extent(self.rounds)
        if self.cost.mean(extent) > self._for_writing:
            extent = self._part(max(1, self._fitting(self._for_writing)))
        if self.in_place and (extent.ipc, extent.rounds) <= (self.in_place.ipc, self.in_place.rounds):
            return None
        return extent

    def too_slow(self, extent: Extent, began: float, fraction: float) -> bool:
        """Whether to give up the last file, begun at `began` seconds and done to `fraction`: it will not be done in
        time, and a smaller one, yet better than the one in place, will.

        What files cost now is then taken from it, so that `last_file` can be asked again.
        """
        spent, time, expected = self.budget.elapsed - began, self.left - self.last, self.cost.mean(extent)
        takes = (spent + WATCH_TRUST * expected) / (fraction + WATCH_TRUST)
        if time > 0 and takes * (1 - fraction) <= time:
            return False
        slower = max(1.0, takes / expected)
        in_place = self.in_place.ipc if self.in_place else 0
        if time > 0 and self._fitting(self._for_writing / slower) <= WATCH_GAIN * in_place:
            return False
        self.cost.rescale(slower)
        return True

    def can_wait(self) -> bool:
        """Whether there is time to wait for other ranks before the file is begun, and not to the last moment: they make
        it slower while they are at work."""
        return WAIT_FACTOR * self.cost.bound(self.shape.extent(self.rounds)) + self.closing < self.left

    def overdue(self) -> bool:
        """Whether the last file, of the rounds there are, should be begun without waiting for the batch any longer."""
        return self.rounds > 0 and self.budget.elapsed >= self.overdue_at()

    def overdue_at(self) -> float:
        """When that is, in seconds of the budget: somewhat earlier for a batch that takes far too long."""
        extent, end = self.shape.extent(self.rounds), self.budget.elapsed + self.left - self.closing
        mean, bound = self.cost.mean(extent), self.cost.bound(extent)
        stalled = self.batch_began + max(STALL_FACTOR * self.batch_expected, self.batch_expected + STALL_SECONDS)
        return min(end - (mean + bound) / 2, max(stalled, end - bound - STALL_RESERVE))

    def late(self) -> bool:
        """Whether the process has to go now."""
        return self.left <= self.last

    def plan(self) -> Plan:
        """The rounds to expect from here on."""
        return make_plan(
            self.left, self.total_images, self.batch.current, self.pace, self.finish, self.shape, self.ranks
        )

    def too_small(self) -> BudgetError:
        """Says that the budget cannot hold one round, and what would."""
        if not self.batches:
            return BudgetError(
                f"a budget of {self.budget.seconds:g} s cannot hold one round: it is over before the first of "
                f"{math.ceil(self.shape.classes / self.batch.current)} batches is done; try --budget "
                f"{math.ceil(2 * self.budget.seconds)}s or --batch-size 1"
            )
        start = max(0.0, self.budget.elapsed - self.images * self.pace.mean)
        generate = self.pace.mean * self.shape.classes
        finish = self.finish(self.shape.extent(1))
        needed = start + generate + finish
        return BudgetError(
            f"a budget of {self.budget.seconds:g} s cannot hold one round: {self.shape.classes} images need about "
            f"{needed:.0f} s here ({start:.1f} to start, {generate:.1f} to generate, {finish:.1f} to write); "
            f"try --budget {math.ceil(1.2 * needed)}s"
        )

    @property
    def _for_writing(self) -> float:
        """Seconds that the last file may be planned to take: not quite to the last."""
        return self.left - (self.closing + self.last) / 2

    def _takes(self, extent: Extent) -> float:
        """Cautious seconds for a snapshot."""
        return self.cost.bound(extent) / SNAPSHOT_CORE

    def _fitting(self, time: float) -> int:
        """The most images a class that can cautiously be written in so many seconds."""
        most = range(1, self.shape.ipc(self.rounds) + 1)
        return bisect_right(most, time, key=lambda ipc: self.cost.bound(self._part(ipc)))

    def _part(self, ipc: int) -> Extent:
        """The file of so many images a class, of all rounds there are."""
        return Extent(min(self.rounds, ipc), ipc)

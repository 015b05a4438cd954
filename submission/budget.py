"""The deadline clock and the plan. Pure Python: seconds in, decisions out.

The rule behind everything here: at any moment, attempt the largest whole number of rounds whose remaining images,
at a cautious pace, and whose file, at its cautious cost, still fit into the time left.
"""

import math
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from submission.devices import Device
from submission.errors import BudgetError, UsageError
from submission.estimates import Extent, FileCost

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
# Seconds kept for the first batch of a device that comes late, to others whose pace is known.
FIRST_BATCH = 5.0
# A device is started anew where so many times what that takes is left for generating.
START_GAIN = 2.0
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
    generate: Callable[[int], float],
    finish: Callable[[Extent], float],
    shape: Shape,
) -> Plan:
    """The largest plan that fits into `left` seconds, given `images_done` so far, counted across rounds.

    `generate` says how many seconds so many images take, and `finish` how many to keep for a file. The plan's `rounds`
    never lie below the whole rounds already done; equal to them means: stop generating, finish now.
    """

    def generating(rounds: int) -> float:
        return generate(max(0, rounds * shape.classes - images_done))

    def total(rounds: int) -> float:
        return generating(rounds) + finish(shape.extent(rounds))

    done = images_done // shape.classes
    beyond = range(done + 1, max(shape.cap, done) + 1)
    rounds = done + bisect_right(beyond, left, key=total)
    return Plan(rounds, shape.ipc(rounds), generating(rounds), finish(shape.extent(rounds)))


@dataclass
class Scheduler:
    """Measures and decides: what a device gets next, when a snapshot is due, when to stop, what to write last.

    It goes on while the fastest pace seen, or to be hoped of larger batches, could still complete a round (trying costs
    nothing) and the cautious pace leaves time to write what is there. `in_place` is what the file on disk holds,
    `spent` the seconds that snapshots have taken from generation.

    `afterwards` are the seconds kept for what is made of the last file when it is in place, and given up for the file
    where need be.

    `rounds` are those that a file may hold now, the first ones without a gap; `before` those of a run before, wherever
    they stand; `images` those that the `devices` have made in this run.
    """

    budget: Budget
    shape: Shape
    cost: FileCost
    devices: list[Device]
    before: int = 0
    rounds: int = 0
    images: int = 0
    in_place: Extent | None = None
    spent: float = 0.0
    hurried_end: float = math.inf
    afterwards: float = 0.0

    @property
    def total_images(self) -> int:
        """Images done, in this run and in whole rounds of one before."""
        return self.before * self.shape.classes + self.images

    @property
    def paced(self) -> Sequence[Device]:
        """The devices at work whose pace is known."""
        return [device for device in self.devices if device.ready and device.batches]

    @property
    def images_per_second(self) -> float:
        """Of all devices together."""
        return sum(1 / device.pace.mean for device in self.paced)

    @property
    def batch_size(self) -> int:
        """The largest that a device works with."""
        return max((device.batch.current for device in self.devices), default=1)

    @property
    def done(self) -> bool:
        """Whether there are as many images as there may be."""
        return self.total_images >= self.shape.cap * self.shape.classes

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

    def next_batch(self, device: Device) -> int:
        """How many images to give to a device next, behind what it has in hand: 0 where that could not come back in
        time, or there are none."""
        classes, now = self.shape.classes, self.budget.elapsed
        asked = self.total_images + self.in_hand
        full = min(device.batch.current, max(self.shape.cap * classes - asked, 0))
        if self.rounds == 0 and device.batches < BATCHES_BEFORE_GIVING_UP:
            return full
        if not device.batches:  # it comes late, or the rounds are of a run before
            kept = FIRST_BATCH if self.paced else 0.0
            return full if kept + self.finish(self.shape.extent(self.rounds)) <= self.left else 0
        missing = classes - asked % classes
        fastest = sum(1 / (one.fastest / (1 if one.batch.settled else BATCH_HOPE)) for one in self.paced)
        hopeful = missing / fastest + self.finish(self.shape.extent((asked + missing) // classes))
        others = max(one.wait(now) for one in self.devices)
        # A whole round that one device does not manage, several may.
        for size in (full, min(full, missing), min(full, math.ceil(missing / len(self.paced)))):
            own = device.wait(now) + device.pace.bound(size, device.batch.current)
            cautious = max(own, others) + self.finish(self.shape.extent((asked + size) // classes))
            if max(hopeful, cautious) <= self.left:
                return size
        return 0

    @property
    def in_hand(self) -> int:
        """Images that devices are expected to come back with."""
        return sum(len(batch.numbers) for device in self.devices for batch in device.in_hand if not batch.handed_on)

    def observe(self, device: Device, seconds: float, made: int, rounds: int, *, disturbed: bool = False) -> bool:
        """Takes what a device has come back with after so many seconds of its own: `made` images that were still
        missing, after which `rounds` may be written. True where the batch was an outage (`Device.observe`)."""
        batch = device.took(self.budget.elapsed)
        device.images += made
        self.images += made
        self.rounds = rounds
        return device.observe(
            len(batch.numbers),
            seconds,
            self.left,
            disturbed=disturbed or batch.disturbed,
            compiled=batch.compiles,
        )

    def pays_to_start(self) -> bool:
        """Whether a device that is started now would be ready early enough to be worth it."""
        loading = max(device.loading for device in self.devices)
        return self.left - self.finish(self.shape.extent(self.rounds)) > START_GAIN * loading

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

    def overdue(self) -> bool:
        """Whether the last file, of the rounds there are, should be begun without waiting for the batch any longer."""
        return self.rounds > 0 and self.budget.elapsed >= self.overdue_at()

    def overdue_at(self) -> float:
        """When that is, in seconds of the budget: somewhat earlier where all that is under way is late."""
        extent, end = self.shape.extent(self.rounds), self.budget.elapsed + self.left - self.closing
        mean, bound = self.cost.mean(extent), self.cost.bound(extent)
        stalled = max((device.in_hand[0].late_at for device in self.devices if device.in_hand), default=0.0)
        return min(end - (mean + bound) / 2, max(stalled, end - bound - STALL_RESERVE))

    def late(self) -> bool:
        """Whether the process has to go now."""
        return self.left <= self.last

    def plan(self) -> Plan:
        """The rounds to expect from here on."""
        return make_plan(self.left, self.total_images, self.generate, self.finish, self.shape)

    def generate(self, images: float) -> float:
        """Cautious seconds for so many images, to which each device contributes as it is fast."""
        shares = [(device, images / device.pace.mean / self.images_per_second) for device in self.paced]
        return max((device.pace.bound(share, device.batch.current) for device, share in shares), default=0.0)

    def too_small(self) -> BudgetError:
        """Says that the budget cannot hold one round, and what would."""
        if not self.paced:
            return BudgetError(
                f"a budget of {self.budget.seconds:g} s cannot hold one round: it is over before the first of "
                f"{math.ceil(self.shape.classes / self.batch_size)} batches is done; try --budget "
                f"{math.ceil(2 * self.budget.seconds)}s or --batch-size 1"
            )
        start = max(0.0, self.budget.elapsed - self.images / self.images_per_second)
        generate = self.shape.classes / self.images_per_second
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

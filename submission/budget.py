"""The deadline clock, the throughput estimate and the plan. Pure Python: seconds in, decisions out.

The rule behind everything here: at any moment, attempt the largest whole number of rounds whose remaining images,
at a cautious pace, and whose file, at its measured cost, still fit into the time left.
"""

import math
import re
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from submission.errors import BudgetError, UsageError

# Seconds kept back for what comes after the file is in place: contact sheet, manifest, exit.
CLOSING_SECONDS = 2.0
# Writing is extrapolated from a smaller file, on a disk and cores shared with others: files six times as large were
# seen to take 1.7 times as long an image.
FINISH_CAUTION = 2.0
# A larger file replaces the one in place when the rounds have grown by this factor since, and writing it is expected
# to take at most this share of the time left. After the first, all of
# them together then cost less than 3% of the budget.
SNAPSHOT_GROWTH, SNAPSHOT_SHARE = 4, 0.02
# The pace is the mean of recent batches; the bound adds this many standard deviations of a batch.
PACE_DEVIATIONS = 2.0
# Weight of the newest batch in the running mean: about the last ten batches count.
PACE_WEIGHT = 0.2
# A larger batch is preferred only where it makes images faster by at least this factor.
BATCH_GAIN = 1.03
# Batches timed at each size.
BATCH_TRIALS = 3
# Batches measured before a budget is called too small: the first ones are slow.
BATCHES_BEFORE_GIVING_UP = 3
# No trial batch may be expected to take more than this share of the time left.
BATCH_TRIAL_SHARE = 0.02


def parse_seconds(text: str) -> float:
    """Reads a duration: `600`, `90s` or `10m`, in seconds. Raises UsageError for anything else or for <= 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m)?", text.strip())
    seconds = float(match[1]) * (60 if match[2] == "m" else 1) if match else 0.0
    if seconds <= 0:
        raise UsageError(f"budget {text!r} is not a duration: write seconds or minutes, as in 600, 90s or 10m")
    return seconds


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class FinishCost:
    """What writing a file costs, in seconds: `fixed` whatever its size, and `per_image` in it, copy or not."""

    fixed: float
    per_image: float

    def writing(self, rounds: int, shape: Shape) -> float:
        """Seconds to write a file of so many rounds; never falls as they grow."""
        return self.fixed + self.per_image * shape.classes * shape.ipc(rounds)

    def seconds(self, rounds: int, shape: Shape) -> float:
        """Cautious seconds from the last image to the end of the process."""
        return FINISH_CAUTION * self.writing(rounds, shape) + CLOSING_SECONDS


@dataclass
class Pace:
    """Seconds an image, as a running mean over batches with its deviation (exponential weights)."""

    mean: float = 0.0
    variance: float = 0.0
    batches: int = 0

    def observe(self, images: int, seconds: float) -> None:
        self.batches += 1
        weight = max(PACE_WEIGHT, 1 / self.batches)
        surprise = seconds / images - self.mean
        self.mean += weight * surprise
        self.variance = (1 - weight) * (self.variance + weight * surprise**2) if self.batches > 1 else 0.0

    def bound(self, images: int, batch_size: int) -> float:
        """Cautious seconds for so many images: deviations of independent batches add up as their square root."""
        batches = images / batch_size
        return images * self.mean + PACE_DEVIATIONS * batch_size * math.sqrt(self.variance * batches)


@dataclass(frozen=True)
class Plan:
    """So many rounds in all, so many images a class, so many seconds still to generate and then to finish."""

    rounds: int
    ipc: int
    generate: float
    finish: float


def make_plan(left: float, images_done: int, batch_size: int, pace: Pace, cost: FinishCost, shape: Shape) -> Plan:
    """The largest plan that fits into `left` seconds, given `images_done` so far, counted across rounds.

    Its `rounds` never lie below the whole rounds already done; equal to them means: stop generating, finish now.
    """

    def generate(rounds: int) -> float:
        return pace.bound(max(0, rounds * shape.classes - images_done), batch_size)

    def total(rounds: int) -> float:
        return generate(rounds) + cost.seconds(rounds, shape)

    done = images_done // shape.classes
    beyond = range(done + 1, max(shape.cap, done) + 1)
    rounds = done + bisect_right(beyond, left, key=total)
    return Plan(rounds, shape.ipc(rounds), generate(rounds), cost.seconds(rounds, shape))


@dataclass
class BatchSize:
    """Finds the batch size while real batches are generated, so that no trial is wasted: doubles while that pays.

    A `fixed` size is taken as it is. Sizes are tried from 1 up to `limit`, each `BATCH_TRIALS` times, the best
    time counting: the first use of a size is slow (kernels are chosen), and a stall must not decide.
    """

    fixed: int | None = None
    limit: int = 1024
    current: int = 1
    settled: bool = False
    seconds_per_image: dict[int, float] = field(default_factory=dict)
    trials: int = 0

    def __post_init__(self) -> None:
        if self.fixed is not None:
            self.current, self.settled = self.fixed, True

    def observe(self, seconds: float, left: float) -> None:
        """Takes the time of a batch of the current size, and what is left of the budget, both in seconds."""
        if self.settled:
            return
        self.trials += 1
        known = self.seconds_per_image
        known[self.current] = min(seconds / self.current, known.get(self.current, seconds))
        affordable = BATCH_TRIAL_SHARE * left
        if self.trials < BATCH_TRIALS and seconds < affordable:
            return
        fastest = min(known.values())
        best = min(size for size in known if known[size] <= BATCH_GAIN * fastest)
        doubled = 2 * self.current
        # One doubling without gain is forgiven, so that noise between two sizes does not end the search.
        if doubled <= self.limit and doubled * known[self.current] < affordable and self.current <= 2 * best:
            self.current, self.trials = doubled, 0
        else:
            self.current, self.settled = best, True

    def out_of_memory(self) -> None:
        """The current size does not fit: settle on half of it."""
        self.current, self.settled = max(1, self.current // 2), True


@dataclass
class Scheduler:
    """Measures and decides: the size of the next batch, how many rounds to expect, when to stop.

    It goes on while the fastest pace seen could still complete a round (trying costs nothing) and the cautious pace
    leaves time to write what is there (being late costs everything). `cost` may be replaced once a file has been
    written and timed.
    """

    budget: Budget
    shape: Shape
    cost: FinishCost
    batch: BatchSize
    pace: Pace = field(default_factory=Pace)
    fastest: float = math.inf
    images: int = 0
    batches: int = 0

    @property
    def rounds(self) -> int:
        """Whole rounds done."""
        return self.images // self.shape.classes

    def next_batch(self) -> int:
        """How many images to generate next, 0 where it is time to write. Raises BudgetError if no round can be done."""
        full = min(self.batch.current, self.shape.cap * self.shape.classes - self.images)
        if self.rounds == 0 and self.batches < BATCHES_BEFORE_GIVING_UP:
            return full
        missing = self.shape.classes - self.images % self.shape.classes
        hopeful = self.fastest * missing + self.cost.seconds(self.rounds + 1, self.shape)
        for size in (full, min(full, missing)):
            rounds_after = (self.images + size) // self.shape.classes
            cautious = self.pace.bound(size, self.batch.current) + self.cost.seconds(rounds_after, self.shape)
            if max(hopeful, cautious) <= self.budget.left:
                return size
        if self.rounds == 0:
            raise self._too_small()
        return 0

    def file_due(self, written: int) -> bool:
        """Whether to write what is there now, the file in place holding `written` rounds.

        The first round is written at once: from then on a complete file is in place and its cost is known. Raises
        BudgetError where there is no time left even for that.
        """
        if written:
            affordable = self.cost.writing(self.rounds, self.shape) <= SNAPSHOT_SHARE * self.budget.left
            return self.rounds >= SNAPSHOT_GROWTH * written and affordable
        if self.rounds and self.budget.left < self.cost.seconds(self.rounds, self.shape):
            raise self._too_small()
        return self.rounds > 0

    def observe(self, images: int, seconds: float) -> None:
        """Takes a batch that is done: how many images, and how long they took."""
        self.images += images
        self.batches += 1
        self.fastest = min(self.fastest, seconds / images)
        if not self.batch.settled:
            self.batch.observe(seconds, self.budget.left)
            self.pace = Pace(mean=self.fastest, batches=1)
        elif images == self.batch.current:  # a smaller one would look slow: every batch has a fixed cost
            self.pace.observe(images, seconds)

    def plan(self) -> Plan:
        """The rounds to expect from here on."""
        return make_plan(self.budget.left, self.images, self.batch.current, self.pace, self.cost, self.shape)

    def _too_small(self) -> BudgetError:
        start = self.budget.elapsed - self.images * self.pace.mean
        generate = self.pace.mean * self.shape.classes
        finish = self.cost.seconds(1, self.shape)
        needed = start + generate + finish
        return BudgetError(
            f"a budget of {self.budget.seconds:g} s cannot hold one round: {self.shape.classes} images need about "
            f"{needed:.0f} s here ({start:.1f} to start, {generate:.1f} to generate, {finish:.1f} to write); "
            f"try --budget {math.ceil(1.2 * needed)}s"
        )

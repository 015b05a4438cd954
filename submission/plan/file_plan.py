"""What to write, and when: snapshots while images are generated, and the last file.

The first complete round is written at once; larger files replace it as rounds multiply. What each took corrects the
estimate of what the last one will cost, and so the reserve that is kept for it.
"""

from bisect import bisect_right
from dataclasses import dataclass

from submission.plan.budget import Budget
from submission.plan.estimates import Composition, Extent, FileCost

# Seconds and share of the budget kept for what comes after the last file: manifest, exit, surprises.
CLOSING_SECONDS, CLOSING_SHARE = 0.5, 0.003
# A snapshot is due when the rounds have grown by the factor since the last one, and all snapshots together take no more
# from generation than the share: of the time so far for a small step, of the whole budget for a large one, and of the
# whole budget for the last, which is made with `LAST_STEP_AT` of it left: it has to do where the disk is too slow
# for the last file. They may take 3% in all; the rest is for what their estimates lack.
SMALL_STEP, SMALL_STEP_SHARE = 1.25, 0.004
LARGE_STEP, LARGE_STEP_SHARE = 2.5, 0.006
LAST_STEP, LAST_STEP_SHARE, LAST_STEP_AT = 1.05, 0.022, 0.08
# Where that does not pay for all there is, a part is written if it is so many times better than the file in place.
LAST_PART = 1.5
# The share that a snapshot gets of a core which generation wants, too.
SNAPSHOT_CORE = 0.25
# While the last file is written, the first moments say little: what was expected of it counts as if so much of it had
# been seen. It is given up only for a file that is so many times better than the one in place.
WATCH_TRUST, WATCH_GAIN = 0.15, 1.1
# Seconds by which the last file is begun earlier where the batch before it does not come back.
STALL_RESERVE = 1.0
# Choosing and sharpening may take so many times as long as was measured. They end so many seconds before the last file
# has to be begun, lest the guard begin with it.
CHOOSING_DOUBT, CHOOSING_MARGIN = 1.1, 2.0


@dataclass
class FilePlan:
    """The file on disk and the ones to come.

    `rounds` may be written now: the first ones, without a gap. `in_place` is what the file on disk holds, `spent` the
    seconds that snapshots have taken from generation. `afterwards` are the seconds reserved for what is made of the
    last file once it is in place; a job that was told to stop gives them up. It takes `choosing` seconds per round to
    choose from a pool, and `sharpening` seconds to sharpen the choice.
    """

    budget: Budget
    composition: Composition
    cost: FileCost
    afterwards: float = 0.0
    choosing: float = 0.0
    sharpening: float = 0.0
    rounds: int = 0
    in_place: Extent | None = None
    spent: float = 0.0

    @property
    def whole(self) -> Extent:
        """The file of all rounds there are, where they are a pool of as many as there are images."""
        return self.composition.extent(min(self.rounds, self.composition.cap))

    @property
    def closing_reserve(self) -> float:
        """Seconds that should still be left when the last file is in place."""
        if self.budget.hurried:
            return CLOSING_SECONDS
        return CLOSING_SECONDS + CLOSING_SHARE * self.budget.seconds + self.afterwards

    def reserve(self, rounds: int) -> float:
        """Cautious seconds from the last of so many rounds to the deadline."""
        cap = self.composition.cap
        choosing = 0.0
        if rounds > cap and not self.budget.hurried:
            choosing = CHOOSING_DOUBT * (self.choosing * rounds + self.sharpening) + CHOOSING_MARGIN
        return choosing + self.cost.bound(self.composition.extent(min(rounds, cap))) + self.closing_reserve

    @property
    def spare(self) -> float:
        """Seconds for which the last file may wait for a better choice of its images; none where time is over."""
        file = self.cost.bound(self.whole) + self.closing_reserve + CHOOSING_MARGIN
        return 0.0 if self.budget.hurried else max(0.0, self.budget.usable - file)

    def grew(self, rounds: int) -> None:
        """So many rounds may be written now."""
        self.rounds = rounds

    def choosing_takes(self, seconds: float) -> None:
        """So long per round, as was measured anew."""
        self.choosing = seconds

    def wrote(self, extent: Extent, seconds: float, spent: float) -> None:
        """A snapshot was written, which would have taken so many seconds alone and took `spent` from generation."""
        self.spent += spent
        self.cost.observe(extent, seconds)

    def placed(self, extent: Extent | None) -> None:
        """A file was put in place or, with None, the one that was has been removed by someone."""
        self.in_place = extent

    def due(self) -> Extent | None:
        """The snapshot to write now beside generation, if any: the first round at once, then larger files as they
        pay."""
        extent = self.whole
        if not self.rounds or self.in_place is None:
            return extent if self.rounds else None
        growth = extent.rounds / self.in_place.rounds
        if self.rounds > self.composition.cap and growth > 1:  # no larger one comes, and choosing takes its time
            fund = LAST_STEP_SHARE * self.budget.seconds
        elif self._takes(extent) + LAST_STEP_AT * self.budget.seconds > self.budget.usable and growth >= LAST_STEP:
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
        in_time = self._takes(extent) <= self.budget.usable - self.reserve(self.rounds)
        return extent if in_time and self.spent + self.cost.bound(extent) <= fund else None

    def last_file(self, *, chosen: bool = False) -> Extent | None:
        """What to write last: all there is if it is expected to fit, else what surely does; None where the file in
        place is no worse, unless that of all there is has `chosen` images. With none in place, it is tried whatever the
        time."""
        extent = self.whole
        if self.cost.mean(extent) > self._for_writing:
            extent = self._part(max(1, self._fitting(self._for_writing)))
        better = chosen and extent == self.whole
        if self.in_place and not better and (extent.ipc, extent.rounds) <= (self.in_place.ipc, self.in_place.rounds):
            return None
        return extent

    def too_slow(self, extent: Extent, began: float, fraction: float) -> bool:
        """Whether to give up the last file, begun at moment `began` and done to `fraction`: it will not be done in
        time, and a smaller one, yet better than the one in place, will.

        What files cost now is then taken from it, so that `last_file` can be asked again.
        """
        budget = self.budget
        spent, time, expected = budget.elapsed - began, budget.usable - budget.exit_reserve, self.cost.mean(extent)
        takes = (spent + WATCH_TRUST * expected) / (fraction + WATCH_TRUST)
        if time > 0 and takes * (1 - fraction) <= time:
            return False
        slower = max(1.0, takes / expected)
        in_place = self.in_place.ipc if self.in_place else 0
        if time > 0 and self._fitting(self._for_writing / slower) <= WATCH_GAIN * in_place:
            return False
        self.cost.rescale(slower)
        return True

    def overdue_at(self, late_at: float) -> float:
        """The moment at which the last file of the rounds there are should be begun without waiting any longer:
        somewhat earlier where all batches under way are late, the last of them from moment `late_at` on."""
        end = self.budget.elapsed + self.budget.usable - self.closing_reserve
        mean, bound = self.cost.mean(self.whole), self.cost.bound(self.whole)
        return min(end - (mean + bound) / 2, max(late_at, end - bound - STALL_RESERVE))

    @property
    def _for_writing(self) -> float:
        """Seconds that the last file may be planned to take: not quite to the end."""
        return self.budget.usable - (self.closing_reserve + self.budget.exit_reserve) / 2

    def _takes(self, extent: Extent) -> float:
        """Cautious seconds for a snapshot."""
        return self.cost.bound(extent) / SNAPSHOT_CORE

    def _fitting(self, time: float) -> int:
        """The most images per class that can cautiously be written in so many seconds."""
        most = range(1, self.whole.ipc + 1)
        return bisect_right(most, time, key=lambda ipc: self.cost.bound(self._part(ipc)))

    def _part(self, ipc: int) -> Extent:
        """The file of so many images per class, of all rounds there are."""
        return Extent(min(self.rounds, ipc), ipc)

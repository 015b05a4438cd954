"""The batch size, found while real batches are generated. Pure Python."""

from dataclasses import dataclass, field

# A larger batch is preferred only where it makes images faster by at least this factor.
BATCH_GAIN = 1.005
# Batches timed at each size.
BATCH_TRIALS = 3
# The part of a trial's time that is lost where a size does not pay: its images count, they only came slowly.
TRIAL_RISK = 0.1


def pays_back(cost: float, gain: float, left: float) -> bool:
    """Whether an investment of `cost` seconds, after which work goes `gain` times as fast, gets more done in the
    `left` seconds than going on without it."""
    return (left - cost) * gain > left


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
        if self.trials < BATCH_TRIALS and self._affordable(self.current, left):
            return
        fastest = min(known.values())
        best = min(size for size in known if known[size] <= BATCH_GAIN * fastest)
        doubled = 2 * self.current
        # Two doublings without gain are forgiven, so that noise between sizes does not end the search.
        if doubled <= self.limit and self.current <= 4 * best and self._affordable(doubled, left):
            self.current, self.trials = doubled, 0
        else:
            self.current, self.settled = best, True

    def _affordable(self, size: int, left: float) -> bool:
        """Whether trials of a size pay back if it brings half of what the doubling before it brought: so it is where
        every batch has a fixed cost."""
        known = self.seconds_per_image
        half, quarter = known.get(size // 2, known[self.current]), known.get(size // 4)
        gain = max(BATCH_GAIN, half / (half - (quarter - half) / 2)) if quarter else 2.0
        return pays_back(TRIAL_RISK * BATCH_TRIALS * size * half, gain, left)

    def grow_no_more(self) -> None:
        """Memory allows no larger batches."""
        self.limit = self.current

    def out_of_memory(self) -> None:
        """The current size does not fit: settle on half of it."""
        self.current, self.settled = max(1, self.current // 2), True

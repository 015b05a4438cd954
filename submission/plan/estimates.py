"""What is known of the time things take, and how well: the pace of images, the cost of a file."""

import math
from dataclasses import dataclass, field

# The pace is the mean over recent batches; the bound adds so many standard deviations of a batch.
PACE_DEVIATIONS = 2.0
# Weight of the newest batch in the running mean: about the last ten batches count.
PACE_WEIGHT = 0.2

# The bound on a file's cost adds so many standard deviations.
FILE_DEVIATIONS = 1.25
# How far a machine may be from the guesses made for it: all of them by a common factor of 1 +- this, each by its own.
COMMON_SPREAD, OWN_SPREAD = 1.5, 0.5
# Until the spread of files has been seen, two of one size are taken to differ by this share, which counts as if so many
# files had been seen.
FILE_NOISE, FILE_NOISE_WEIGHT = 0.12, 4
# Beyond the largest file seen, this deviation is added for every factor of e: files six times as large were seen to
# take 1.7 times as long per image on a crowded machine, and no longer on a quiet one.
EXTRAPOLATION = 0.18
# Other programs come and go: where they make everything take twice as long, this share is reserved on top.
CROWDING_DOUBT = 0.25


@dataclass(frozen=True)
class Extent:
    """How much a file holds: `ipc` images per class, those of the first `rounds` rounds and copies of them."""

    rounds: int
    ipc: int


@dataclass(frozen=True)
class Composition:
    """How rounds become images per class (IPC).

    A round is one image of each of the `classes`; an image has at most so many augmented `copies`; a class has at most
    `cap` images. Up to `pool` rounds are generated: the images are chosen from them where they are more than the cap.
    """

    classes: int
    copies: int
    cap: int
    pool: int = 0

    @property
    def most_rounds(self) -> int:
        """Beyond which nothing is generated."""
        return max(self.cap, self.pool)

    def ipc(self, rounds: int) -> int:
        return min(self.cap, rounds * (1 + self.copies))

    def extent(self, rounds: int) -> Extent:
        """The file of so many rounds with all their copies."""
        return Extent(rounds, self.ipc(rounds))


@dataclass
class Pace:
    """Seconds per image, as a running mean over batches with its variance (exponential weights)."""

    mean: float = 0.0
    variance: float = 0.0
    batches: int = 0

    def observe(self, images: int, seconds: float) -> None:
        self.batches += 1
        weight = max(PACE_WEIGHT, 1 / self.batches)
        surprise = seconds / images - self.mean
        self.mean += weight * surprise
        self.variance = (1 - weight) * (self.variance + weight * surprise**2) if self.batches > 1 else 0.0

    def bound(self, images: float, batch_size: int) -> float:
        """Cautious seconds for so many images: deviations of independent batches add up as their square root."""
        batches = images / batch_size
        return images * self.mean + PACE_DEVIATIONS * batch_size * math.sqrt(self.variance * batches)


@dataclass
class FileCost:
    """What making, writing and verifying a file costs: `fixed` seconds, and seconds per image, `generated` or a `copy`.

    The three numbers are guesses. What files really took corrects them: a linear model of three factors, one for each
    guess, updated as a Kalman filter does (Kalman 1960). The factors start at one, with a spread that is mostly common
    to all three, since a slow machine is slow at everything: a single file then says something of all. `crowding` is
    how many times as long as alone everything takes at present, because of other programs on the machine.
    """

    classes: int
    fixed: float
    generated: float
    copy: float
    factors: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    covariance: list[list[float]] = field(
        default_factory=lambda: [[COMMON_SPREAD**2 + OWN_SPREAD**2 * (i == j) for j in range(3)] for i in range(3)]
    )
    residuals: list[float] = field(default_factory=list)
    largest: float = 0.0
    crowding: float = 1.0

    def observe(self, extent: Extent, seconds: float) -> None:
        """Takes what a file of that extent took, or would have taken without others on the machine."""
        parts = self._parts(extent)
        gain = [sum(c * p for c, p in zip(row, parts, strict=True)) for row in self.covariance]
        variance = sum(g * p for g, p in zip(gain, parts, strict=True)) + (self._noise() * seconds) ** 2
        surprise = seconds - sum(f * p for f, p in zip(self.factors, parts, strict=True))
        self.factors = [f + g * surprise / variance for f, g in zip(self.factors, gain, strict=True)]
        self.covariance = [
            [c - a * b / variance for c, b in zip(row, gain, strict=True)]
            for row, a in zip(self.covariance, gain, strict=True)
        ]
        self.largest = max(self.largest, seconds)
        self.residuals.append(self._uncrowded(extent) / seconds - 1)

    def crowded(self, factor: float) -> None:
        """Everything takes `factor` times as long as alone at present."""
        self.crowding = factor

    def rescale(self, factor: float) -> None:
        """Everything takes `factor` times as long as was thought."""
        self.factors = [factor * f for f in self.factors]
        self.covariance = [[factor**2 * c for c in row] for row in self.covariance]

    def mean(self, extent: Extent) -> float:
        """Expected seconds for a file; above zero."""
        return self.crowding * self._uncrowded(extent)

    def bound(self, extent: Extent) -> float:
        """Cautious seconds for a file: more where little is known, files differed, or none as large has been seen."""
        parts, mean = self._parts(extent), self._uncrowded(extent)
        unknown = sum(
            a * b * c for a, row in zip(parts, self.covariance, strict=True) for b, c in zip(parts, row, strict=True)
        )
        beyond = EXTRAPOLATION * math.log(max(1.0, mean / self.largest)) if self.largest else 0.0
        deviation = math.sqrt(max(unknown, 0.0) + (self._noise() ** 2 + beyond**2) * mean**2)
        crowding = self.crowding * (1 + CROWDING_DOUBT * (self.crowding - 1))
        return crowding * (mean + FILE_DEVIATIONS * deviation)

    def _uncrowded(self, extent: Extent) -> float:
        # A factor may come out negative where files so far could not tell the parts from each other.
        return sum(max(f, 0.02) * p for f, p in zip(self.factors, self._parts(extent), strict=True))

    def _parts(self, extent: Extent) -> tuple[float, float, float]:
        """What the guesses say: fixed part, generated images, copies."""
        generated = min(extent.rounds, extent.ipc)
        copies = extent.ipc - generated
        return self.fixed, self.generated * self.classes * generated, self.copy * self.classes * copies

    def _noise(self) -> float:
        squares = FILE_NOISE_WEIGHT * FILE_NOISE**2 + sum(r**2 for r in self.residuals)
        return math.sqrt(squares / (FILE_NOISE_WEIGHT + len(self.residuals)))

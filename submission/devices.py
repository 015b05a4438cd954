"""What the driver knows of its devices: how fast each is, and what it has in hand. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from submission.batch_size import BatchSize, pays_back
from submission.estimates import Pace

# A batch that takes this many times as long as expected, and this many seconds longer, is an outage and no pace.
STALL_FACTOR, STALL_SECONDS = 5.0, 1.0
# The first batch of a device, of which nothing is known yet, may take so many seconds, or times as long as its loading.
FIRST_PATIENCE, FIRST_FACTOR = 30.0, 4.0
# A device is taken to hang when its batch is late by so many times the patience with it, and by so many seconds: to
# start it anew costs about as much.
HUNG_FACTOR, HUNG_SECONDS = 4.0, 20.0
# What compiling the networks is expected to take in seconds, and to gain: on an H200, with weights of SDXL-Turbo's size
# at 512 px, it took 35 s, 46 with the VAE, and the UNet went 1.2 times as fast. With slower cores it takes longer.
COMPILE_SECONDS, COMPILE_GAIN, COMPILE_PATIENCE = 45.0, 1.2, 240.0
# Batches by which a pace is known well enough to be compared.
PACE_BATCHES = 3


@dataclass
class Batch:
    """Image numbers int64 [n] that a device has in hand.

    It `began` at that second of the budget, is `expected` to take so many, cautiously, and is late after `patience`.
    A late one is `handed_on`: its images are another's, too. `disturbed`: a snapshot was being written meanwhile.
    `compiles`: the networks are compiled for it first.
    """

    numbers: NDArray[np.int64]
    began: float
    expected: float
    patience: float
    disturbed: bool = False
    compiles: bool = False
    handed_on: bool = False

    @property
    def late_at(self) -> float:
        return self.began + self.patience

    @property
    def hung_at(self) -> float:
        return self.began + max(HUNG_FACTOR * self.patience, self.patience + HUNG_SECONDS)


@dataclass
class Device:
    """A device, by `name` and the `node` it is on. It is `ready` once its generator is loaded, which took `loading`
    seconds, and `dropped` where it is not started any more; `restarts` says how often it was started anew, `images` how
    many it has made, and `facts` how. `fastest` is in seconds an image. `in_hand` are its batches, in their order.
    Once its networks are `compiled`, `eager` is the pace that it had before; the next batch `compiles` them.
    """

    batch: BatchSize
    name: str = ""
    node: str = ""
    ready: bool = True
    dropped: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0
    restarts: int = 0
    loading: float = 0.0
    pace: Pace = field(default_factory=Pace)
    fastest: float = math.inf
    batches: int = 0
    stalled: bool = False
    in_hand: list[Batch] = field(default_factory=list)
    compiled: bool = False
    compiles: bool = False
    eager: float | None = None

    def consider_compiling(self, generating: float) -> None:
        """Whether its networks are to be compiled from the next batch on, where so many seconds of generating are left:
        once, when the pace as they are is known and it is expected to pay back; and whether it did, or is undone."""
        if self.eager is None:
            known = self.batch.settled and self.pace.batches >= PACE_BATCHES
            if known and pays_back(COMPILE_SECONDS, COMPILE_GAIN, generating):
                self.eager, self.compiled, self.compiles = self.pace.mean, True, True
        elif self.compiled and self.pace.batches >= PACE_BATCHES and self.pace.mean > self.eager:
            if any(batch.compiles for batch in self.in_hand):
                return  # the pace is still the one before
            self.compiled, self.pace = False, Pace(self.eager)

    def forget_compiling(self) -> None:
        """It runs as it is, in a process of its own that has begun anew, or because the compiled batch does not fit."""
        self.compiled = self.compiles = False

    def give(self, numbers: NDArray[np.int64], now: float, *, disturbed: bool = False) -> None:
        """Puts images into its hands at second `now` of the budget."""
        expected = self.pace.bound(len(numbers), self.batch.current)
        patience = max(STALL_FACTOR * expected, expected + STALL_SECONDS)
        if not self.batches:
            patience = max(FIRST_PATIENCE, FIRST_FACTOR * self.loading)
        if self.compiles:
            expected, patience = expected + COMPILE_SECONDS, COMPILE_PATIENCE
        self.in_hand.append(Batch(numbers, now, expected, patience, disturbed, self.compiles))
        self.compiles = False

    def took(self, now: float) -> Batch:
        """Takes the batch that it has come back with; the next one began when this one ended."""
        batch = self.in_hand.pop(0)
        if self.in_hand:
            self.in_hand[0].began = now
        return batch

    def wait(self, now: float) -> float:
        """Cautious seconds until it has nothing in hand."""
        if not self.in_hand:
            return 0.0
        first, *others = self.in_hand
        return max(0.0, first.began + first.expected - now) + sum(batch.expected for batch in others)

    def observe(
        self, images: int, seconds: float, left: float, *, disturbed: bool = False, compiled: bool = False
    ) -> bool:
        """Takes a batch that is done: how many images, and how long they took. True where it was an outage.

        One outage says nothing of the pace; two in a row are a new pace. A batch `disturbed` by a snapshot in the
        making says nothing of its size, and one for which the networks were `compiled` nothing at all. `left` is what
        is left of the budget, in seconds.
        """
        self.batches += 1
        if compiled:
            self.pace = Pace(self.pace.mean)
            return False
        self.fastest = min(self.fastest, seconds / images)
        expected = images * self.pace.mean
        outage = self.pace.batches > 0 and seconds > max(STALL_FACTOR * expected, expected + STALL_SECONDS)
        self.stalled, repeated = outage, self.stalled
        if outage and not repeated:
            return True
        if not self.batch.settled:
            if not disturbed and images == self.batch.current:
                self.batch.observe(seconds, left)
            self.pace = Pace(mean=self.fastest, batches=1)
        elif images == self.batch.current or not self.pace.batches:
            # A smaller one would look slow: every batch has a fixed cost. It has to do for a beginning.
            self.pace.observe(images, seconds)
        return outage

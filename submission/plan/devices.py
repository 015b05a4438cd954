"""What the driver knows of its devices: how fast each is, and what it has in hand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from submission.plan.batch_size import BatchSize, pays_back
from submission.plan.estimates import Pace

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

    It `began` at that moment of the budget, is `expected` to take so many seconds, cautiously, and is late after
    `patience`. A late one is `handed_on`: other devices make its images, too. `disturbed`: a snapshot was being written
    meanwhile. `compiles`: the networks are compiled for it first.
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
class Throughput:
    """How fast a device makes images, and in batches of which size.

    `fastest` is the least of all batches, in seconds per image; `stalled` says that the last batch was an outage.
    """

    batch_size: BatchSize
    pace: Pace = field(default_factory=Pace)
    fastest: float = math.inf
    batches: int = 0
    stalled: bool = False

    def expected(self, images: int) -> float:
        """Seconds for so many images."""
        return images * self.pace.mean

    def bound(self, images: float) -> float:
        """Cautious seconds for so many images."""
        return self.pace.bound(images, self.batch_size.current)

    def observe(self, images: int, seconds: float, left: float, *, disturbed: bool = False) -> bool:
        """Takes a batch that is done: how many images, and how long they took. True where it was an outage.

        One outage says nothing of the pace; two in a row are a new pace. A batch `disturbed` by a snapshot in the
        making says nothing of its size. `left` is what is left of the budget, in seconds.
        """
        self.batches += 1
        self.fastest = min(self.fastest, seconds / images)
        expected = self.expected(images)
        outage = self.pace.batches > 0 and seconds > max(STALL_FACTOR * expected, expected + STALL_SECONDS)
        self.stalled, repeated = outage, self.stalled
        if outage and not repeated:
            return True
        if not self.batch_size.settled:
            if not disturbed and images == self.batch_size.current:
                self.batch_size.observe(seconds, left)
            self.pace = Pace(mean=self.fastest, batches=1)
        elif images == self.batch_size.current or not self.pace.batches:
            # A smaller one would look slow: every batch has a fixed cost. It has to do for a beginning.
            self.pace.observe(images, seconds)
        return outage

    def forget_pace(self) -> None:
        """A batch is done for which the networks were compiled: it says nothing of the pace, which begins anew."""
        self.batches += 1
        self.pace = Pace(self.pace.mean)


@dataclass
class Compilation:
    """Whether a device's networks are compiled. `eager` is the pace that it had before, in seconds per image; the next
    batch is the one that compiles where it is `due`."""

    on: bool = False
    due: bool = False
    eager: float | None = None


@dataclass
class Device:
    """A device, by `name` and the `node` it is on.

    `state`: its generator is still `loading`, which takes `loading` seconds; it is `ready`; or it is `dropped`, and not
    started any more. `facts` say how it makes images, `images` how many it has made, `restarts` how often it was
    started anew. `in_hand` are its batches, in their order.
    """

    speed: Throughput
    name: str = ""
    node: str = ""
    state: Literal["loading", "ready", "dropped"] = "ready"
    loading: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0
    restarts: int = 0
    compilation: Compilation = field(default_factory=Compilation)
    in_hand: list[Batch] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    def loaded(self, name: str, node: str, facts: Mapping[str, Any], seconds: float) -> None:
        """Its generator is there, after so many seconds."""
        self.name, self.node, self.facts, self.loading, self.state = name, node, facts, seconds, "ready"

    def consider_compiling(self, generating: float) -> None:
        """Decides, before a batch, whether to compile the networks, where so many seconds of generating are left: once,
        when the eager pace is known and compiling should pay back. Undoes it where the compiled pace is slower."""
        compilation, pace = self.compilation, self.speed.pace
        known = pace.batches >= PACE_BATCHES
        if compilation.eager is None:
            if known and self.speed.batch_size.settled and pays_back(COMPILE_SECONDS, COMPILE_GAIN, generating):
                self.compilation = Compilation(on=True, due=True, eager=pace.mean)
        elif compilation.on and known and pace.mean > compilation.eager:
            if any(batch.compiles for batch in self.in_hand):
                return  # the pace is still the one before
            self.compilation, self.speed.pace = Compilation(eager=compilation.eager), Pace(compilation.eager)

    def give(self, numbers: NDArray[np.int64], now: float, *, disturbed: bool = False) -> None:
        """Puts images into its hands at moment `now` of the budget."""
        expected = self.speed.bound(len(numbers))
        patience = max(STALL_FACTOR * expected, expected + STALL_SECONDS)
        if not self.speed.batches:
            patience = max(FIRST_PATIENCE, FIRST_FACTOR * self.loading)
        if self.compilation.due:
            expected, patience = expected + COMPILE_SECONDS, COMPILE_PATIENCE
        self.in_hand.append(Batch(numbers, now, expected, patience, disturbed, self.compilation.due))
        self.compilation.due = False

    def wait(self, now: float) -> float:
        """Cautious seconds until it has nothing in hand."""
        if not self.in_hand:
            return 0.0
        first, *others = self.in_hand
        return max(0.0, first.began + first.expected - now) + sum(batch.expected for batch in others)

    def came_back(
        self, now: float, seconds: float, made: int, left: float, *, disturbed: bool, facts: Mapping[str, Any]
    ) -> bool:
        """Takes the first batch in hand as done, after so many seconds; `made` of its images were still missing. True
        where it was an outage (`Throughput.observe`)."""
        batch, self.facts = self._took(now), facts
        self.images += made
        if batch.compiles:
            self.speed.forget_pace()
            self.compilation.on = self.facts["compiled"]
            return False
        return self.speed.observe(len(batch.numbers), seconds, left, disturbed=disturbed or batch.disturbed)

    def out_of_memory(self, now: float) -> NDArray[np.int64]:
        """The first batch in hand does not fit into its memory: returns its numbers, and settles on half the size."""
        numbers = self._took(now).numbers
        self.compilation = Compilation(eager=self.compilation.eager)
        if 1 < len(numbers) <= self.speed.batch_size.current:  # the one behind it was asked for before this was known
            self.speed.batch_size.out_of_memory()
        return numbers

    def hand_on(self) -> list[NDArray[np.int64]]:
        """What it has in hand and nobody else makes yet, as numbers of each batch: others are to make it as well."""
        batches = [batch for batch in self.in_hand if not batch.handed_on]
        for batch in batches:
            batch.handed_on = True
        return [batch.numbers for batch in batches]

    def lost(self, *, again: bool) -> None:
        """The device is gone with what it had in hand. It is started anew, not compiled, or dropped."""
        self.in_hand.clear()
        self.compilation = Compilation(eager=self.compilation.eager)
        self.state = "loading" if again else "dropped"
        self.restarts += again

    def _took(self, now: float) -> Batch:
        """The first batch in hand; the next one began when this one ended."""
        batch = self.in_hand.pop(0)
        if self.in_hand:
            self.in_hand[0].began = now
        return batch

"""A planner on a clock that is made up."""

from dataclasses import dataclass

import numpy as np

from submission.plan.budget import Budget
from submission.plan.estimates import Composition, FileCost
from submission.plan.file_plan import FilePlan
from submission.plan.planner import Planner


@dataclass
class FakeClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def make_planner(
    seconds: float,
    *,
    batch: int | None = 5,
    cap: int = 10**6,
    copies: int = 4,
    classes: int = 10,
    file: tuple[float, float, float] = (0.1, 1e-4, 1e-4),
    now: float = 0.0,
    devices: int = 1,
    afterwards: float = 0.0,
    pool: int = 0,
    choosing: float = 0.0,
    sharpening: float = 0.0,
) -> tuple[Planner, FakeClock]:
    """A planner of devices that are ready, in batches of so many images or, with None, of the size that is best."""
    clock = FakeClock(now)
    composition, cost = Composition(classes, copies, cap, pool), FileCost(classes, *file)
    planner = Planner(FilePlan(Budget(seconds, 0.0, clock), composition, cost, afterwards, choosing, sharpening))
    planner.expect(devices, batch)
    for device in planner.devices:
        device.loaded("made up", "", {}, 0.0)
    return planner, clock


def batch_done(planner: Planner, size: int, seconds: float, device: int = 0) -> bool:
    """A device takes so many images in hand and comes back with them; True where that was an outage."""
    one = planner.devices[device]
    one.give(np.arange(size), planner.budget.elapsed)
    rounds = (planner.images + size) // planner.file_plan.composition.classes
    return planner.observe(one, seconds, size, rounds, disturbed=False, facts={})


def next_batch(planner: Planner) -> int:
    """For the first device."""
    return planner.next_batch(planner.devices[0])


def generate(planner: Planner, clock: FakeClock, seconds_per_image: float) -> None:
    """Batches until the planner wants no more; files cost what they are expected to."""
    files = planner.file_plan
    while size := next_batch(planner):
        clock.now += size * seconds_per_image
        batch_done(planner, size, size * seconds_per_image)
        if (extent := files.due()) is not None:
            files.placed(extent)
            files.wrote(extent, files.cost.mean(extent), files.cost.mean(extent))

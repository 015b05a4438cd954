"""What to generate: how many images each device gets next, and when it is time to write.

The rule: at any moment, attempt the largest whole number of rounds whose remaining images, at a cautious pace, and
whose file, at its cautious cost, still fit into the time left.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from submission.errors import BudgetError
from submission.plan.batch_size import BatchSize
from submission.plan.budget import Budget
from submission.plan.devices import Device, Throughput
from submission.plan.estimates import Extent
from submission.plan.file_plan import FilePlan

# Batches measured before a budget is called too small: the first ones are slow.
BATCHES_BEFORE_GIVING_UP = 3
# While its size is still sought, larger batches may yet make images so many times as fast as the fastest so far.
BATCH_HOPE = 4.0
# Seconds reserved for the first batch of a device that comes late, where the pace of others is known.
FIRST_BATCH = 5.0
# A device is started anew where so many times what that takes is left for generating.
START_GAIN = 2.0
# With this share of the budget left at the end, what would have fitted into it is worth a line; at most so many times
# as many rounds are looked at.
IDLE_SHARE, MOST_TIMES = 0.2, 100


@dataclass(frozen=True)
class Plan:
    """So many rounds in all and images per class, so many seconds still to generate and to reserve for the file."""

    rounds: int
    ipc: int
    generate: float
    reserve: float


@dataclass
class Planner:
    """Decides what the `devices` make, so that the file of `file_plan` comes out as large as it can.

    It goes on while the fastest pace seen, or to be hoped of larger batches, could still complete a round (trying costs
    nothing) and the cautious pace leaves time to write what is there. `before` are the rounds that a run before has
    left, wherever they stand; `images` are those that the devices have made in this run.
    """

    file_plan: FilePlan
    devices: list[Device] = field(default_factory=list)
    before: int = 0
    images: int = 0

    @property
    def budget(self) -> Budget:
        return self.file_plan.budget

    @property
    def total_images(self) -> int:
        """Images done, in this run and in whole rounds of one before."""
        return self.before * self.file_plan.composition.classes + self.images

    @property
    def paced(self) -> Sequence[Device]:
        """The devices at work whose pace is known."""
        return [device for device in self.devices if device.ready and device.speed.batches]

    @property
    def images_per_second(self) -> float:
        """Of all devices together."""
        return sum(1 / device.speed.pace.mean for device in self.paced)

    @property
    def batch_size(self) -> int:
        """The largest that a device works with."""
        return max((device.speed.batch_size.current for device in self.devices), default=1)

    @property
    def in_hand(self) -> int:
        """Images that devices are expected to come back with."""
        return sum(len(batch.numbers) for device in self.devices for batch in device.in_hand if not batch.handed_on)

    @property
    def done(self) -> bool:
        """Whether there are as many images as there may be."""
        return self.total_images >= self.file_plan.composition.most_rounds * self.file_plan.composition.classes

    def expect(self, devices: int, batch_size: int | None) -> None:
        """There are to be so many devices, with batches of a fixed size or, with None, the one that measures best."""
        while len(self.devices) < devices:
            self.devices.append(Device(Throughput(BatchSize(batch_size)), state="loading"))

    def next_batch(self, device: Device) -> int:
        """How many images to give to a device next, behind what it has in hand: 0 where that could not come back in
        time, or there are none."""
        files, classes, now = self.file_plan, self.file_plan.composition.classes, self.budget.elapsed
        asked, left = self.total_images + self.in_hand, self.budget.usable
        full = min(device.speed.batch_size.current, max(files.composition.most_rounds * classes - asked, 0))
        if files.rounds == 0 and device.speed.batches < BATCHES_BEFORE_GIVING_UP:
            return full
        if not device.speed.batches:  # it comes late, or the rounds are of a run before
            kept = FIRST_BATCH if self.paced else 0.0
            return full if kept + files.reserve(files.rounds) <= left else 0
        missing = classes - asked % classes
        fastest = sum((1 if one.speed.batch_size.settled else BATCH_HOPE) / one.speed.fastest for one in self.paced)
        hopeful = missing / fastest + self._reserve(asked + missing)
        others = max(one.wait(now) for one in self.devices)
        # A whole round that one device does not manage, several may.
        for size in (full, min(full, missing), min(full, math.ceil(missing / len(self.paced)))):
            cautious = max(device.wait(now) + device.speed.bound(size), others) + self._reserve(asked + size)
            if max(hopeful, cautious) <= left:
                return size
        return 0

    def observe(
        self, device: Device, seconds: float, made: int, rounds: int, *, disturbed: bool, facts: Mapping[str, Any]
    ) -> bool:
        """Takes what a device has come back with after so many seconds of its own: `made` images that were still
        missing, after which `rounds` may be written. True where the batch was an outage (`Throughput.observe`)."""
        self.images += made
        self.file_plan.grew(rounds)
        now, left = self.budget.elapsed, self.budget.usable
        return device.came_back(now, seconds, made, left, disturbed=disturbed, facts=facts)

    def pays_to_start(self) -> bool:
        """Whether a device that is started now would be ready early enough to be worth it."""
        loading = max(device.loading for device in self.devices)
        return self.budget.usable - self.file_plan.reserve(self.file_plan.rounds) > START_GAIN * loading

    def time_to_write(self) -> bool:
        """Whether the time left is what the file of the rounds there are needs, whatever is still under way."""
        return self.file_plan.rounds > 0 and self.budget.usable <= self.file_plan.reserve(self.file_plan.rounds)

    def overdue(self) -> bool:
        """Whether the last file should have been begun by now (`FilePlan.overdue_at`)."""
        return self.file_plan.rounds > 0 and self.budget.elapsed >= self.file_plan.overdue_at(self.late_at)

    @property
    def late_at(self) -> float:
        """The moment from which on all batches under way are late; never, where there are none."""
        # The guard asks, while the main thread takes batches out of hands.
        return max((batch.late_at for device in self.devices for batch in device.in_hand[:1]), default=math.inf)

    def plan(self) -> Plan:
        """The largest plan that fits into the time left. Its rounds never lie below the whole rounds already done, and
        equal them where it is time to write."""
        composition, images, left = self.file_plan.composition, self.total_images, self.budget.usable

        def generating(rounds: int) -> float:
            return self.generate(max(0, rounds * composition.classes - images))

        done = images // composition.classes
        beyond, reserve = range(done + 1, max(composition.most_rounds, done) + 1), self.file_plan.reserve
        rounds = done + bisect_right(beyond, left, key=lambda rounds: generating(rounds) + reserve(rounds))
        return Plan(rounds, composition.ipc(rounds), generating(rounds), reserve(rounds))

    def generate(self, images: float) -> float:
        """Cautious seconds for so many images, to which each device contributes as it is fast."""
        shares = [(device, images / device.speed.pace.mean / self.images_per_second) for device in self.paced]
        return max((device.speed.bound(share) for device, share in shares), default=0.0)

    def would_fit(self) -> tuple[int, float] | None:
        """Where all images allowed are made long before the deadline: how many rounds the time would have held, and
        how many times as long each might have taken. None where there is little time left."""
        budget, files = self.budget, self.file_plan
        most, classes = files.composition.most_rounds, files.composition.classes
        left = budget.usable - files.closing_reserve
        if not self.done or budget.hurried or not self.paced or left < IDLE_SHARE * budget.seconds:
            return None

        def takes(rounds: int) -> float:
            file = rounds if not files.composition.pool else files.composition.cap
            choosing = files.choosing * rounds + files.sharpening if files.composition.pool else 0.0
            return self.generate((rounds - most) * classes) + choosing + files.cost.bound(Extent(file, file))

        fitting = bisect_right(range(most + 1, MOST_TIMES * most), left, key=takes)
        return most + fitting, 1 + left / self.generate(most * classes)

    def facts(self) -> dict[str, Any]:
        """For the manifest: how images are made (by the first device, and in the same manner by all), what each device
        made, and the budget."""
        told = [device.facts for device in self.devices if device.facts]
        return {
            "budget_seconds": self.budget.seconds,
            "elapsed_seconds": round(self.budget.elapsed, 2),
            "snapshots_seconds": round(self.file_plan.spent, 3),
            "batch_size": self.batch_size,
            "devices": [
                {"name": one.name, "node": one.node, "images": one.images, "restarts": one.restarts}
                for one in self.devices
            ],
            **(told[0] if told else {}),
            "images_regenerated": sum(facts["images_regenerated"] for facts in told),
            "peak_memory_bytes": max((facts["peak_memory_bytes"] for facts in told), default=0),
        }

    def too_small(self) -> BudgetError:
        """Says that the budget cannot hold one round, and what would."""
        seconds, classes = self.budget.seconds, self.file_plan.composition.classes
        if not self.paced:
            longer = math.ceil(2 * max(seconds, self.budget.elapsed))  # later than a task's share of a total
            return BudgetError(
                f"a budget of {round(seconds, 2):g} s cannot hold one round: it is over before the first of "
                f"{math.ceil(classes / self.batch_size)} batches is done; try --budget {longer}s or "
                "--batch-size 1"
            )
        start = max(0.0, self.budget.elapsed - self.images / self.images_per_second)
        generate = classes / self.images_per_second
        write = self._reserve(classes)
        needed = start + generate + write
        return BudgetError(
            f"a budget of {round(seconds, 2):g} s cannot hold one round: {classes} images need about {needed:.0f} s "
            f"here ({start:.1f} to start, {generate:.1f} to generate, {write:.1f} to write); "
            f"try --budget {math.ceil(1.2 * needed)}s"
        )

    def _reserve(self, images: int) -> float:
        """Seconds to reserve for the file of the whole rounds among so many images."""
        return self.file_plan.reserve(images // self.file_plan.composition.classes)

"""The planner on a fake clock over seeded traces of a machine, beside a fixed IPC, a one-shot estimate and an oracle.

Each trace is a machine and its mishaps: how fast it generates at every moment, what a file costs, what goes wrong. The
job's own planner decides, as it does in `submission/job`; only the machine is made up. A stall is one of the
device: it holds up generation, not the clock. The oracle knows the trace, and finds the largest IPC that could be
generated with the best batch size and written in time, without any snapshot. The other policies have neither snapshots
nor a guard: whoever is late has nothing.
"""

import argparse
import math
import multiprocessing
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

import numpy as np

from submission.arguments import number_from
from submission.plan.budget import Budget
from submission.plan.estimates import Composition, Extent, FileCost
from submission.plan.file_plan import SNAPSHOT_CORE, FilePlan
from submission.plan.planner import Planner

KINDS = ("steady", "drift", "throttle", "stalls", "slow disk", "tiny budget", "an hour", "a pool")
# The speed of a trace is constant on so many slices of its budget.
SLICES = 600
# The last file is looked at so many times while it is written.
LOOKS = 40
# The cost of an image in a file grows with this power of the file's size.
FILE_GROWTH = 0.07
# Larger batches are worked off in parts of this size, and are no faster.
LARGEST_BATCH = 256
# A fixed IPC is chosen for a machine like this one with so much of the budget in use, the speed of machines varying.
FIXED_USE, MACHINE_SPREAD = 0.75, 0.2
# A one-shot estimate is made after so many batches, of this size, and believed to this share.
ONE_SHOT_BATCHES, ONE_SHOT_BATCH, ONE_SHOT_BELIEF = 5, 32, 0.9


@dataclass(frozen=True)
class Machine:
    """How fast images are made: so many seconds per `image` and per `batch`, whatever its size, at full speed.

    `work[i]` is the generating done by the end of slice i of `seconds` where nothing else is, in seconds of full speed.
    `usual_pace` is what someone would expect of an image before meeting this machine.
    """

    seconds: float
    image: float
    batch: float
    usual_pace: float
    work: tuple[float, ...]

    def generating(self, images: int, batch: int) -> float:
        """Seconds at full speed."""
        return images * self.image + math.ceil(images / min(batch, LARGEST_BATCH)) * self.batch

    def after(self, now: float, work: float) -> float:
        """When so much work is done that was begun at `now`; infinite where the trace ends before."""
        slice_seconds = self.seconds / SLICES
        place = now / slice_seconds
        index = int(place)
        if index >= SLICES:
            return math.inf
        before = self.work[index - 1] if index else 0.0
        target = before + (self.work[index] - before) * (place - index) + work
        last: int = bisect_right(self.work, target)
        if last >= SLICES:
            return math.inf
        before = self.work[last - 1] if last else 0.0
        place = last + (target - before) / (self.work[last] - before)
        return max(now, slice_seconds * place)


@dataclass(frozen=True)
class Disk:
    """What a file of `usual_images` costs in seconds, `fixed`, and per image, `generated` or a `copy`; from second
    `slows_at` on, `factor` times as long."""

    fixed: float
    generated: float
    copy: float
    usual_images: float
    slows_at: float
    factor: float

    def writing(self, extent: Extent, classes: int, now: float) -> float:
        """Seconds to write a file that is begun at `now`."""
        count = min(extent.rounds, extent.ipc)
        images = classes * (self.generated * count + self.copy * (extent.ipc - count))
        alone = self.fixed + images * math.pow(classes * extent.ipc / self.usual_images, FILE_GROWTH)
        until = max(0.0, self.slows_at - now)
        return alone if alone <= until else until + (alone - until) * self.factor


@dataclass(frozen=True)
class Trace:
    """A machine over a budget of so many seconds: when it begins to generate, what the planner guesses that a file
    costs (fixed part, generated image, copy), how long the process takes to end, and what it takes to choose from a
    pool, seconds per round."""

    kind: str
    seed: int
    seconds: float
    start: float
    composition: Composition
    machine: Machine
    disk: Disk
    guess: tuple[float, float, float]
    closing: float
    choosing: float = 0.0

    def writing(self, extent: Extent, now: float) -> float:
        """Seconds to write a file that is begun at `now`."""
        return self.disk.writing(extent, self.composition.classes, now)


@dataclass(frozen=True)
class Outcome:
    """What a policy came to: images per class on disk (where they are chosen: in the pool), when its process was gone,
    the share that snapshots took."""

    ipc: int
    end: float
    snapshots: float = 0.0


def draw_trace(kind: str, seed: int) -> Trace:
    """The machine of one kind that a seed stands for."""
    dice = random.Random(f"{kind} {seed}")
    seconds = {"tiny budget": dice.uniform(15, 40), "an hour": 3600.0}.get(kind, dice.choice([120.0, 300.0, 600.0]))
    start = dice.uniform(3, 6 if kind == "tiny budget" else 15)
    composition = Composition(dice.choice([100, 200]), dice.choice([0, 4]), 10**7)
    rounds = math.exp(dice.uniform(math.log(50), math.log(3000)))
    usual_pace = (seconds - start) / (rounds * composition.classes)
    pace = usual_pace * math.exp(dice.gauss(0, MACHINE_SPREAD))
    overhead = dice.uniform(1, 12)  # of a batch, in images
    image = pace / (1 + overhead / LARGEST_BATCH)
    # The whole file takes this share of the budget, as it would be with the usual pace.
    share = math.exp(dice.uniform(math.log(5e-4), math.log(0.03)))
    generated = share * seconds / (rounds * composition.classes * (1 + 2 * composition.copies))
    file = (dice.uniform(0.02, 0.2), generated, 2 * generated)
    common = math.exp(dice.gauss(0, 0.7))
    guess = [cost * common * math.exp(dice.gauss(0, 0.3)) for cost in file]
    slow = kind == "slow disk"
    work = tuple(accumulate(speed * seconds / SLICES for speed in draw_speeds(kind, seconds, dice)))
    usual_images = rounds * composition.classes * (1 + composition.copies)
    slows_at = seconds * dice.uniform(0.85, 0.98) if slow else math.inf
    choosing = 0.0
    if kind == "a pool":
        composition = Composition(composition.classes, composition.copies, dice.choice([1, 10, 50]), 10**7)
        choosing = math.exp(dice.uniform(math.log(0.01), math.log(0.5))) * pace * composition.classes
    return Trace(
        kind=kind,
        seed=seed,
        seconds=seconds,
        start=start,
        composition=composition,
        machine=Machine(seconds, image, overhead * image, usual_pace, work),
        disk=Disk(*file, usual_images, slows_at, dice.uniform(1.5, 4) if slow else 1.0),
        guess=(guess[0], guess[1], guess[2]),
        closing=dice.uniform(0.05, 0.3),
        choosing=choosing,
    )


def draw_speeds(kind: str, seconds: float, dice: random.Random) -> list[float]:
    """How fast generation goes in each slice of the budget: 1 as a rule, give or take a few per cent."""
    speeds = [math.exp(dice.gauss(0, 0.03)) for _ in range(SLICES)]
    if kind == "drift":
        end = dice.uniform(0.7, 1.3)
        speeds = [speed * (1 + (end - 1) * i / SLICES) for i, speed in enumerate(speeds)]
    elif kind == "throttle":
        at = dice.uniform(0.4, 0.6)
        speeds = [speed * (0.7 if i > at * SLICES else 1.0) for i, speed in enumerate(speeds)]
    elif kind == "stalls":
        # About one in half a minute, most of a second, some of a good part of the budget (Pareto).
        for _ in range(round(seconds / 30)):
            lasts = min(0.1 * seconds, 0.3 * dice.paretovariate(1.2))
            begins = dice.uniform(0, seconds)
            for i in range(SLICES):
                overlap = min(begins + lasts, (i + 1) * seconds / SLICES) - max(begins, i * seconds / SLICES)
                speeds[i] *= 1 - min(1.0, max(0.0, overlap) / (seconds / SLICES))
    return [max(speed, 1e-6) for speed in speeds]


def run_ours(trace: Trace) -> Outcome:
    """The job's planner on this machine, as `submission/job` and the guard use it."""
    clock, dice = _Clock(trace.start), random.Random(trace.seed)
    files = FilePlan(
        Budget(trace.seconds, 0.0, clock),
        trace.composition,
        FileCost(trace.composition.classes, *trace.guess),
        choosing=trace.choosing,
    )
    planner, exit_at = Planner(files), trace.seconds - files.budget.exit_reserve
    planner.expect(1, None)
    device = planner.devices[0]
    device.loaded("made up", "", {}, 0.0)
    making, remaining = None, 0.0  # the snapshot in the making, and the core's time it still needs
    alone = spent = 0.0
    while size := planner.next_batch(device):
        began = clock.now
        device.give(np.arange(size), began)
        ends = trace.machine.after(began, trace.machine.generating(size, size))
        if disturbed := making is not None:
            slowed = min(remaining, (ends - began) * SNAPSHOT_CORE / (1 - SNAPSHOT_CORE))
            ends += slowed
            remaining -= slowed
        # The guard does not wait for a batch that does not come back.
        overdue = max(began, files.overdue_at(planner.late_at))
        if files.rounds and ends > overdue:
            clock.now = overdue
            break
        if ends > exit_at:
            return Outcome(0, exit_at)
        clock.now = ends
        rounds = (planner.images + size) // trace.composition.classes
        planner.observe(device, clock.now - began, size, rounds, disturbed=disturbed, facts={})
        if making and remaining <= 0:
            files.placed(making)
            files.wrote(making, alone * dice.uniform(0.9, 1.3), spent)
            making = None
        if not making and (extent := files.due()) is not None:
            making = extent
            alone = trace.writing(extent, clock.now)
            spent = remaining = min(alone, trace.writing(extent, -math.inf))  # waiting for a disk costs no core
    if not files.rounds:
        return Outcome(0, clock.now)
    snapshots = files.spent + (spent - remaining if making else 0.0)
    pool = files.rounds if files.rounds > files.composition.cap else 0
    choosing = pool * trace.choosing * dice.uniform(0.9, 1.2)
    if pool:  # where time is short, classes are chosen from fewer rounds
        share = min(1.0, files.spare / choosing)
        clock.now += share * choosing
        pool = int(share * pool)
    chosen = pool
    while (extent := files.last_file(chosen=bool(chosen))) is not None and not files.budget.late():
        began, takes = clock.now, trace.writing(extent, clock.now) * dice.uniform(0.9, 1.1)
        for look in range(1, LOOKS + 1):
            clock.now = began + takes * look / LOOKS
            if clock.now > exit_at:
                return Outcome(_ipc(files), exit_at, snapshots / trace.seconds)
            if files.too_slow(extent, began, look / LOOKS):
                break
        else:
            files.placed(extent)
            chosen = 0
    return Outcome(pool or _ipc(files), min(clock.now + trace.closing, exit_at + 0.05), snapshots / trace.seconds)


def run_fixed(trace: Trace) -> Outcome:
    """As many rounds as someone would choose by hand who knows machines like this one."""
    rounds = FIXED_USE * (trace.seconds - trace.start) / (trace.machine.usual_pace * trace.composition.classes)
    return _run_blind(trace, int(rounds), trace.start)


def run_one_shot(trace: Trace) -> Outcome:
    """As many rounds as the first batches promise, and not asked again."""
    now = trace.start
    for _ in range(ONE_SHOT_BATCHES):
        began, now = now, trace.machine.after(now, trace.machine.generating(ONE_SHOT_BATCH, ONE_SHOT_BATCH))
    pace = (now - began) / ONE_SHOT_BATCH
    rounds = int(ONE_SHOT_BELIEF * (trace.seconds - trace.start) / (pace * trace.composition.classes))
    return _run_blind(trace, rounds, trace.start, ONE_SHOT_BATCH)


def run_oracle(trace: Trace) -> Outcome:
    """The largest IPC that could have been on disk in time."""

    def fits(rounds: int) -> bool:
        return _run_blind(trace, rounds, trace.start).end + trace.closing <= trace.seconds

    high = 1
    while fits(high):
        high *= 2
    rounds = bisect_right(range(1, high), False, key=lambda rounds: not fits(rounds))
    return _run_blind(trace, rounds, trace.start) if rounds else Outcome(0, trace.seconds)


POLICIES: dict[str, Callable[[Trace], Outcome]] = {
    "ours": run_ours,
    "fixed IPC": run_fixed,
    "one-shot estimate": run_one_shot,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--traces", type=number_from(len(KINDS)), default=2000, metavar="N", help="made-up machines")
    add("--seed", type=number_from(0), default=0, metavar="N", help="of the first trace")
    add("--processes", type=number_from(1), default=2, metavar="N", help="that share the work")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Figures by policy: `overruns`, `oracle_ratio` (mean over all traces) and `oracle_ratio_by_trace` (by kind).

    A trace on which not even the oracle gets a round done is no trial of a policy and is drawn again.
    """
    traces = [(KINDS[i % len(KINDS)], options.seed + i) for i in range(options.traces)]
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        rows = pool.starmap(_try_all, traces, chunksize=20)
    figures: dict[str, Any] = {"traces": len(traces), "seed": options.seed, "policies": {}}
    for number, name in enumerate(POLICIES):
        tried = [row[number] for row in rows]
        by_kind = {
            kind: fmean([ratio for (k, _), (ratio, _, _, _) in zip(traces, tried, strict=True) if k == kind])
            for kind in KINDS
        }
        figures["policies"][name] = {
            "overruns": sum(late for _, late, _, _ in tried),
            "oracle_ratio": fmean([ratio for ratio, _, _, _ in tried]),
            "oracle_ratio_by_trace": by_kind,
            "unused_share": fmean([unused for _, _, unused, _ in tried]),
            "snapshot_share_max": max(share for _, _, _, share in tried),
        }
    return figures


def table(figures: dict[str, Any]) -> str:
    lines = [f"IPC against an oracle, {figures['traces']:,} traces", ""]
    lines.append(f"{'':18}{'overruns':>9}{'mean':>8}" + "".join(f"{kind:>13}" for kind in KINDS))
    for name, row in figures["policies"].items():
        ratios = "".join(f"{row['oracle_ratio_by_trace'][kind]:13.3f}" for kind in KINDS)
        lines.append(f"{name:18}{row['overruns']:9,}{row['oracle_ratio']:8.3f}{ratios}")
    ours = figures["policies"]["ours"]
    unused, snapshots = ours["unused_share"], ours["snapshot_share_max"]
    lines += [
        "",
        f"ours leaves {unused:.1%} of the budget unused on average, and its snapshots take at most {snapshots:.1%}",
    ]
    return "\n".join(lines)


def _try_all(kind: str, seed: int) -> list[tuple[float, bool, float, float]]:
    """For each policy on one trace: IPC over the oracle's, whether late, share unused, share spent on snapshots."""
    trace = draw_trace(kind, seed)
    best = run_oracle(trace).ipc
    while not best:
        seed += 10**9
        trace = draw_trace(kind, seed)
        best = run_oracle(trace).ipc
    outcomes = [policy(trace) for policy in POLICIES.values()]
    return [
        (
            outcome.ipc / best if outcome.end <= trace.seconds else 0.0,
            outcome.end > trace.seconds,
            max(0.0, 1 - outcome.end / trace.seconds),
            outcome.snapshots,
        )
        for outcome in outcomes
    ]


def _run_blind(trace: Trace, rounds: int, now: float, batch: int = LARGEST_BATCH) -> Outcome:
    """So many rounds generated and written, whatever the time."""
    images = rounds * trace.composition.classes
    now = trace.machine.after(now, trace.machine.generating(images, batch))
    pool = rounds if rounds > trace.composition.cap else 0
    if math.isfinite(now):
        now += pool * trace.choosing
        now += trace.writing(trace.composition.extent(rounds), now)
    return Outcome(pool or trace.composition.ipc(rounds), now)


@dataclass
class _Clock:
    now: float

    def __call__(self) -> float:
        return self.now


def _ipc(files: FilePlan) -> int:
    return files.in_place.ipc if files.in_place else 0

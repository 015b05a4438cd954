"""The deadline clock, the estimates and the plan, on a fake clock."""

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from submission.batch_size import BatchSize, pays_back
from submission.budget import BATCHES_BEFORE_GIVING_UP, Budget, Scheduler, Shape, make_plan, parse_seconds, start_budget
from submission.devices import Device
from submission.errors import UsageError
from submission.estimates import Extent, FileCost, Pace
from tools.bench import scheduler as simulator

shapes = st.builds(Shape, st.integers(2, 200), st.integers(0, 6), st.integers(1, 2000))
costs = st.builds(FileCost, st.integers(2, 200), st.floats(0, 5), st.floats(1e-6, 0.01), st.floats(1e-6, 0.01))
paces = st.builds(Pace, st.floats(1e-4, 10), st.floats(0, 1), st.just(5))
extents = st.tuples(st.integers(1, 2000), st.integers(1, 2000)).map(lambda pair: Extent(min(pair), max(pair)))


@dataclass
class FakeClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("text", "seconds"), [("600", 600), ("90s", 90), ("10m", 600), (" 1.5m ", 90), ("0.5 s", 0.5)])
def test_budgets_are_read_in_seconds_and_minutes(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "10h", "ten", "-5", "0", "0s", "1e3", "90 s m", "nan", "inf"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_seconds(text)


def test_the_budget_begins_at_the_earliest_start() -> None:
    now = time.time()
    assert start_budget(100, now - 20, None).elapsed == pytest.approx(20, abs=1)
    assert start_budget(100, now - 20, now - 50).elapsed == pytest.approx(50, abs=1)
    assert start_budget(100, now + 1000).elapsed == pytest.approx(0, abs=1), "a start in the future is passed over"


@given(shapes, st.integers(1, 3000))
def test_ipc_is_images_and_copies_under_the_cap(shape: Shape, rounds: int) -> None:
    assert shape.ipc(rounds) == min(shape.cap, rounds + rounds * shape.copies)
    assert shape.ipc(rounds) <= shape.ipc(rounds + 1) <= shape.cap


@given(st.floats(0, 5000), st.integers(0, 5000), st.integers(1, 64), paces, costs, shapes)
def test_a_plan_fits_and_one_more_round_would_not(
    left: float, images: int, batch: int, pace: Pace, cost: FileCost, shape: Shape
) -> None:
    images = min(images, shape.cap * shape.classes)
    done = images // shape.classes

    def total(rounds: int) -> float:
        return pace.bound(max(0, rounds * shape.classes - images), batch) + cost.bound(shape.extent(rounds))

    plan = make_plan(left, images, lambda count: pace.bound(count, batch), cost.bound, shape)
    assert done <= plan.rounds <= max(done, shape.cap)
    assert plan.ipc == shape.ipc(plan.rounds)
    assert plan.rounds == done or total(plan.rounds) <= left
    assert plan.rounds == shape.cap or total(plan.rounds + 1) > left


@given(st.lists(st.floats(0.01, 1), min_size=20, max_size=100))
def test_the_pace_stays_inside_what_was_measured(seconds: list[float]) -> None:
    pace = Pace()
    for value in seconds:
        pace.observe(4, value)
    assert min(seconds) / 4 * 0.999 <= pace.mean <= max(seconds) / 4 * 1.001
    assert pace.bound(400, 4) >= 400 * pace.mean


def test_a_noisy_pace_is_trusted_less_than_a_steady_one() -> None:
    steady, noisy = Pace(), Pace()
    for value in (1.0, 3.0) * 20:
        steady.observe(1, 2.0)
        noisy.observe(1, value)
    assert noisy.bound(100, 1) - 100 * noisy.mean > 1
    assert steady.bound(100, 1) == pytest.approx(200)


def tune(batch: BatchSize, seconds: dict[int, float], left: float = 1e6) -> int:
    for _ in range(100):
        if batch.settled:
            break
        batch.observe(seconds[batch.current] * batch.current, left)
    assert batch.settled
    return batch.current


def test_the_batch_grows_while_that_pays_and_settles_on_the_best() -> None:
    gains = {1: 1.0, 2: 0.5, 4: 0.3, 8: 0.2, 16: 0.25, 32: 0.3, 64: 0.4}
    assert tune(BatchSize(), gains) == 8
    assert tune(BatchSize(), dict.fromkeys([1, 2, 4, 8], 1.0)) == 1, "no gain: the smallest"
    assert tune(BatchSize(limit=4), {1: 1.0, 2: 0.5, 4: 0.25}) == 4


def test_one_bad_size_does_not_end_the_search() -> None:
    assert tune(BatchSize(), {1: 1.0, 2: 1.5, 4: 0.4, 8: 0.3, 16: 0.5, 32: 0.5, 64: 0.5}) == 8


def test_trials_that_would_cost_too_much_of_the_budget_are_not_made() -> None:
    batch = BatchSize()
    batch.observe(5.0, left=2.5)
    assert batch.settled and batch.current == 1


def test_a_given_batch_size_is_kept_and_halved_when_memory_runs_out() -> None:
    batch = BatchSize(fixed=12)
    batch.observe(1.0, 100.0)
    assert batch.settled and batch.current == 12
    batch.out_of_memory()
    assert batch.current == 6


def test_an_investment_pays_back_while_enough_is_left() -> None:
    assert pays_back(cost=10, gain=1.5, left=31) and not pays_back(cost=10, gain=1.5, left=29)
    assert not pays_back(cost=0.1, gain=1.0, left=1e6)


@given(costs, st.lists(extents, min_size=1, max_size=12), st.floats(0.2, 5), st.integers(0, 10**6))
def test_what_files_took_corrects_the_guesses(cost: FileCost, seen: list[Extent], factor: float, seed: int) -> None:
    """On a machine that is `factor` times as slow as guessed in everything, each file makes the estimate better."""

    def truth(extent: Extent) -> float:
        generated, copies = extent.rounds, extent.ipc - extent.rounds
        images = cost.generated * generated + cost.copy * copies
        return factor * (cost.fixed + cost.classes * images)

    before = {extent: abs(cost.mean(extent) - truth(extent)) for extent in seen}
    for extent in seen * 3:
        cost.observe(extent, truth(extent))
    for extent in seen:
        assert abs(cost.mean(extent) - truth(extent)) <= max(0.2 * truth(extent), before[extent])
        assert cost.bound(extent) >= cost.mean(extent) > 0


def test_the_three_parts_of_a_file_s_cost_are_told_apart() -> None:
    cost = FileCost(100, 0.1, 1e-5, 1e-5)
    for rounds in (1, 5, 20, 60):
        for ipc in (rounds, 3 * rounds, 8 * rounds):
            cost.observe(Extent(rounds, ipc), 0.2 + 100 * (2e-5 * rounds + 4e-5 * (ipc - rounds)))
    for rounds, ipc in ((100, 100), (100, 500), (10, 500)):
        assert cost.mean(Extent(rounds, ipc)) == pytest.approx(
            0.2 + 100 * (2e-5 * rounds + 4e-5 * (ipc - rounds)), rel=0.1
        )


def test_files_that_differ_and_larger_ones_than_any_so_far_are_trusted_less() -> None:
    steady, noisy = FileCost(10, 0.1, 1e-3, 1e-3), FileCost(10, 0.1, 1e-3, 1e-3)
    same = Extent(10, 10)
    for number in range(10):
        steady.observe(same, 0.2)
        noisy.observe(same, 0.1 if number % 2 else 0.3)

    def margin(cost: FileCost, extent: Extent) -> float:
        return cost.bound(extent) / cost.mean(extent) - 1

    assert margin(noisy, same) > 2 * margin(steady, same)
    assert margin(steady, Extent(1000, 1000)) > 2 * margin(steady, same)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(simulator.KINDS), st.integers(0, 10**9))
def test_no_job_on_a_simulated_machine_is_late_and_snapshots_cost_little(kind: str, seed: int) -> None:
    trace = simulator.draw_trace(kind, seed)
    outcome = simulator.run_ours(trace)
    assert outcome.end <= trace.seconds and outcome.snapshots <= 0.03


def make_scheduler(seconds: float, *, batch: int = 5, cap: int = 10**6, copies: int = 4) -> tuple[Scheduler, FakeClock]:
    clock = FakeClock()
    cost = FileCost(10, 0.1, 1e-4, 1e-4)
    device = Device(BatchSize(fixed=batch))
    return Scheduler(Budget(seconds, 0.0, clock), Shape(10, copies, cap), cost, [device]), clock


def batch_done(scheduler: Scheduler, size: int, seconds: float, device: int = 0) -> bool:
    """A device takes so many images in hand and comes back with them, the last of which are in whole rounds."""
    one = scheduler.devices[device]
    one.give(np.arange(size), scheduler.budget.elapsed)
    rounds = (scheduler.images + size) // scheduler.shape.classes
    return scheduler.observe(one, seconds, size, rounds)


def next_batch(scheduler: Scheduler) -> int:
    """For the first device."""
    return scheduler.next_batch(scheduler.devices[0])


def generate(scheduler: Scheduler, clock: FakeClock, image: float) -> None:
    """Batches until the scheduler wants no more; files cost what they are expected to."""
    while size := next_batch(scheduler):
        clock.now += size * image
        batch_done(scheduler, size, size * image)
        if (extent := scheduler.snapshot()) is not None:
            scheduler.wrote(extent, scheduler.cost.mean(extent), scheduler.cost.mean(extent))


def test_a_batch_of_many_rounds_is_not_repeated_when_time_is_short() -> None:
    scheduler, clock = make_scheduler(20, batch=100, copies=0)
    clock.now = 15
    batch_done(scheduler, next_batch(scheduler), 10.0)
    assert scheduler.rounds == 10
    assert next_batch(scheduler) <= 10, "at most the one round that still fits"


def test_time_for_what_comes_afterwards_is_kept_unless_a_signal_takes_it() -> None:
    plain, clock = make_scheduler(100)
    generate(plain, clock, 0.01)
    scheduler, clock = make_scheduler(100)
    scheduler.afterwards = 5.0
    generate(scheduler, clock, 0.01)
    assert 4 < scheduler.left - plain.left < 6
    scheduler.hurry()
    assert scheduler.closing < 1


def test_the_cap_ends_a_job_early() -> None:
    scheduler, clock = make_scheduler(600, cap=7)
    generate(scheduler, clock, 0.01)
    assert scheduler.rounds == 7 and clock.now < 30 and scheduler.last_file() == Extent(7, 7)


def test_a_stall_early_on_does_not_end_the_job() -> None:
    scheduler, clock = make_scheduler(100)
    stalls = 0
    for batch in range(10000):
        size = next_batch(scheduler)
        if not size:
            break
        took = 20.0 if batch == 10 else 0.1
        clock.now += took
        stalls += batch_done(scheduler, size, took)
    unused = scheduler.left - scheduler.finish(scheduler.shape.extent(scheduler.rounds))
    assert 0 <= unused < 1 and stalls == 1


def test_the_first_round_is_written_at_once_and_later_files_are_worth_their_while() -> None:
    scheduler, clock = make_scheduler(1000, batch=10)
    assert scheduler.snapshot() is None
    sizes, spent = [], 0.0
    while size := next_batch(scheduler):
        clock.now += 1.0
        batch_done(scheduler, size, 1.0)
        if (extent := scheduler.snapshot()) is not None:
            sizes.append(extent.rounds)
            spent += scheduler.cost.mean(extent)
            scheduler.wrote(extent, scheduler.cost.mean(extent), scheduler.cost.mean(extent))
    assert sizes[0] == 1 and all(b >= 1.05 * a for a, b in pairwise(sizes))
    assert spent <= 0.03 * 1000 and sizes[-1] > 0.8 * scheduler.rounds


def test_a_job_told_to_stop_is_gone_before_a_container_is_killed() -> None:
    scheduler, clock = make_scheduler(600)
    clock.now = 50
    batch_done(scheduler, 500, 50)
    scheduler.hurry()
    clock.now = 52
    scheduler.hurry()
    assert scheduler.left < 5, "the first signal counts"
    clock.now = 57
    assert scheduler.late()


def test_a_last_file_that_is_too_slow_gives_way_to_a_smaller_one() -> None:
    scheduler, clock = make_scheduler(100, copies=0)
    batch_done(scheduler, 100_000, 50)
    scheduler.cost.observe(Extent(1000, 1000), 1.0)
    scheduler.in_place = Extent(1000, 1000)
    clock.now = 80
    whole = scheduler.last_file()
    assert whole == Extent(10_000, 10_000)
    clock.now = 84
    assert not scheduler.too_slow(whole, 80, 0.5), "it will be done at 88"
    assert scheduler.too_slow(whole, 80, 0.1), "it would be done at 120"
    smaller = scheduler.last_file()
    assert smaller is not None and 1000 < smaller.ipc < 8000
    clock.now = 99
    assert scheduler.last_file() is None, "what is in place has to do"


def test_the_guard_takes_over_when_the_file_should_have_been_begun() -> None:
    scheduler, clock = make_scheduler(100)
    batch_done(scheduler, 100, 50)
    clock.now = 90
    assert not scheduler.overdue() and not scheduler.late()
    clock.now = 99.3
    assert scheduler.overdue() and not scheduler.late()
    clock.now = 99.9
    assert scheduler.late()


def test_a_budget_is_not_called_too_small_before_larger_batches_are_tried() -> None:
    """Images one by one would take 11 s, in batches of 16 they take 2."""
    clock = FakeClock()
    scheduler = Scheduler(
        Budget(6, 0.0, clock), Shape(100, 4, 500), FileCost(100, 0.5, 1e-5, 1e-5), [Device(BatchSize())]
    )
    while size := next_batch(scheduler):
        took = 0.1 + 0.01 * size
        clock.now += took
        batch_done(scheduler, size, took)
    assert scheduler.rounds >= 1


def test_a_budget_without_room_for_a_round_is_said_with_what_it_would_need() -> None:
    def scheduler_for(seconds: float) -> Scheduler:
        cost, device = FileCost(100, 0.5, 1e-5, 1e-5), Device(BatchSize(fixed=10))
        return Scheduler(Budget(seconds, 0.0, clock), Shape(100, 4, 500), cost, [device])

    clock = FakeClock(8.0)
    scheduler = scheduler_for(3)
    while size := next_batch(scheduler):
        clock.now += 0.5
        batch_done(scheduler, size, 0.5)
    assert not scheduler.rounds
    text = str(scheduler.too_small())
    assert "3 s cannot hold one round" in text and "8.0 to start" in text and "5.0 to generate" in text
    suggested = float(text.rpartition("--budget ")[2].removesuffix("s"))
    # Following the advice must help.
    clock.now = 8.0
    retry = scheduler_for(suggested)
    while size := next_batch(retry):
        clock.now += 0.5
        batch_done(retry, size, 0.5)
    assert retry.rounds >= 1


def two_devices(seconds: float, paces: tuple[float, float], batch: int = 10) -> tuple[Scheduler, FakeClock]:
    """Two devices of which each has made a batch, in rounds of ten images."""
    scheduler, clock = make_scheduler(seconds, batch=batch, copies=0)
    scheduler.devices.append(Device(BatchSize(fixed=batch)))
    for device, pace in enumerate(paces):
        for _ in range(BATCHES_BEFORE_GIVING_UP):
            batch_done(scheduler, batch, pace * batch, device)
    return scheduler, clock


def test_several_devices_are_planned_for_as_fast_as_they_are_together() -> None:
    one, _ = make_scheduler(100, batch=10, copies=0)
    batch_done(one, 10, 1.0)
    even, _ = two_devices(100, (0.1, 0.1))
    uneven, _ = two_devices(100, (0.1, 0.4))
    assert one.images_per_second == pytest.approx(10) and even.images_per_second == pytest.approx(20)
    assert uneven.images_per_second == pytest.approx(12.5)
    assert uneven.generate(100) == pytest.approx(8)
    assert one.plan().rounds < uneven.plan().rounds < even.plan().rounds < 2.1 * one.plan().rounds


def test_no_device_is_given_what_would_not_come_back_in_time() -> None:
    scheduler, clock = two_devices(60, (0.1, 2.0))
    fast, slow = scheduler.devices
    clock.now = 30
    assert scheduler.next_batch(fast) == 10 and scheduler.next_batch(slow) == 10
    clock.now = 45
    assert scheduler.next_batch(fast) == 10
    assert scheduler.next_batch(slow) < 10, "ten would take it 20 s"
    fast.give(np.arange(140), clock.now)
    assert scheduler.next_batch(fast) == 0, "it has work for 14 s and would need one more for this"


def test_a_round_that_no_device_makes_alone_in_time_is_shared() -> None:
    scheduler, clock = two_devices(60, (0.5, 0.5))
    clock.now = 60 - scheduler.finish(scheduler.shape.extent(7)) - 3
    assert [scheduler.next_batch(device) for device in scheduler.devices] == [5, 5], "a whole one takes 5 s"


def test_what_is_late_no_longer_counts_as_in_hand() -> None:
    scheduler, clock = two_devices(60, (0.1, 0.1))
    device = scheduler.devices[0]
    device.give(np.arange(10), clock.now)
    assert scheduler.in_hand == 10 and device.in_hand[0].late_at == pytest.approx(clock.now + 5)
    device.in_hand[0].handed_on = True
    assert scheduler.in_hand == 0


def test_a_device_that_comes_late_gets_work_only_while_it_may_come_back() -> None:
    scheduler, clock = two_devices(60, (0.1, 0.1))
    late = Device(BatchSize())
    scheduler.devices.append(late)
    late.loading = 10.0
    clock.now = 30
    assert scheduler.next_batch(late) == 1 and scheduler.pays_to_start()
    clock.now = 56
    assert scheduler.next_batch(late) == 0 and not scheduler.pays_to_start()

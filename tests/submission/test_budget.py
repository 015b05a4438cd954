"""The deadline clock, the estimates and the plan, on a fake clock."""

import random
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from submission.budget import (
    BatchSize,
    Budget,
    FinishCost,
    Pace,
    Scheduler,
    Shape,
    make_plan,
    parse_seconds,
    start_budget,
)
from submission.errors import BudgetError, UsageError

shapes = st.builds(Shape, st.integers(2, 200), st.integers(0, 6), st.integers(1, 2000))
costs = st.builds(FinishCost, st.floats(0, 5), st.floats(0, 0.01))
paces = st.builds(Pace, st.floats(1e-4, 10), st.floats(0, 1), st.just(5))


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
    left: float, images: int, batch: int, pace: Pace, cost: FinishCost, shape: Shape
) -> None:
    images = min(images, shape.cap * shape.classes)
    done = images // shape.classes

    def total(rounds: int) -> float:
        return pace.bound(max(0, rounds * shape.classes - images), batch) + cost.seconds(rounds, shape)

    plan = make_plan(left, images, batch, pace, cost, shape)
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
    assert tune(BatchSize(), dict.fromkeys([1, 2, 4], 1.0)) == 1, "no gain: the smallest"
    assert tune(BatchSize(limit=4), {1: 1.0, 2: 0.5, 4: 0.25}) == 4


def test_one_bad_size_does_not_end_the_search() -> None:
    assert tune(BatchSize(), {1: 1.0, 2: 1.5, 4: 0.4, 8: 0.3, 16: 0.5, 32: 0.5}) == 8


def test_trials_that_would_cost_too_much_of_the_budget_are_not_made() -> None:
    batch = BatchSize()
    batch.observe(5.0, left=100.0)
    assert batch.settled and batch.current == 1


def test_a_given_batch_size_is_kept_and_halved_when_memory_runs_out() -> None:
    batch = BatchSize(fixed=12)
    batch.observe(1.0, 100.0)
    assert batch.settled and batch.current == 12
    batch.out_of_memory()
    assert batch.current == 6


@dataclass(frozen=True)
class Outcome:
    rounds: int
    end: float


def simulate(
    seconds: float, start: float, image: float, noise: float, shape: Shape, cost: FinishCost, seed: int
) -> Outcome:
    """A job on a fake clock, whose batches take `image` seconds an image times a random factor 1 +- `noise`; the last
    file takes up to 1.7 times what the snapshots promise."""
    clock, dice = FakeClock(), random.Random(seed)
    budget = Budget(seconds, 0.0, clock)
    clock.now = start
    scheduler = Scheduler(budget, shape, cost, BatchSize())
    written, snapshots = 0, 0.0
    while size := scheduler.next_batch():
        began = clock.now
        clock.now += (0.02 + size * image) * dice.uniform(1 - noise, 1 + noise)
        scheduler.observe(size, clock.now - began)
        if scheduler.file_due(written):
            snapshots += cost.writing(scheduler.rounds, shape) if written else 0.0
            written = scheduler.rounds
            clock.now += cost.writing(written, shape)
    assert written and snapshots <= 0.03 * seconds
    clock.now += cost.writing(scheduler.rounds, shape) * dice.uniform(0.7, 1.7)
    return Outcome(scheduler.rounds, clock.now)


@given(st.floats(20, 600), st.floats(0.5, 10), st.floats(1e-3, 0.5), st.floats(0, 0.3), st.integers(0, 10**6))
def test_no_simulated_job_is_late_and_none_stops_early(
    seconds: float, start: float, image: float, noise: float, seed: int
) -> None:
    shape, cost = Shape(20, 4, 10**9), FinishCost(0.1, image / 100)
    try:
        outcome = simulate(seconds, start, image, noise, shape, cost, seed)
    except BudgetError:
        possible = start + 20 * (image + 0.02) * (1 + noise) + cost.seconds(1, shape)
        assert possible > 0.8 * seconds
        return
    assert outcome.end <= seconds
    round_seconds = 20 * (image + 0.02)
    unused = seconds - outcome.end
    reserve = cost.seconds(outcome.rounds + 1, shape) - 0.7 * cost.writing(outcome.rounds, shape)
    assert unused <= reserve + 2 * round_seconds, "time enough for another round was left"


def test_a_batch_of_many_rounds_is_not_repeated_when_time_is_short() -> None:
    clock = FakeClock(5.0)
    scheduler = Scheduler(Budget(20, 0.0, clock), Shape(10, 0, 10**6), FinishCost(0.1, 1e-4), BatchSize(fixed=100))
    clock.now += 10
    scheduler.observe(scheduler.next_batch(), 10.0)
    assert scheduler.rounds == 10 and scheduler.file_due(0)
    size = scheduler.next_batch()
    assert size <= 10, "at most the one round that still fits"


def test_the_cap_ends_a_job_early() -> None:
    shape = Shape(10, 4, 7)
    outcome = simulate(600, 5, 0.01, 0.1, shape, FinishCost(0.1, 0.0001), 0)
    assert outcome.rounds == 7 and outcome.end < 30


def test_a_stall_early_on_does_not_end_the_job() -> None:
    clock = FakeClock()
    scheduler = Scheduler(Budget(100, 0.0, clock), Shape(10, 4, 10**6), FinishCost(0.1, 1e-4), BatchSize(fixed=5))
    for batch in range(1000):
        size = scheduler.next_batch()
        if not size:
            break
        took = 20.0 if batch == 10 else 0.1
        clock.now += took
        scheduler.observe(size, took)
    unused = scheduler.budget.left - scheduler.cost.seconds(scheduler.rounds, scheduler.shape)
    assert 0 <= unused < 1


def test_a_budget_without_room_for_a_round_is_said_with_what_it_would_need() -> None:
    clock = FakeClock(8.0)
    scheduler = Scheduler(Budget(3, 0.0, clock), Shape(100, 4, 500), FinishCost(0.5, 1e-3), BatchSize(fixed=10))
    with pytest.raises(BudgetError) as caught:
        for _ in range(10):
            size = scheduler.next_batch()
            clock.now += 0.5
            scheduler.observe(size, 0.5)
    text = str(caught.value)
    assert "3 s cannot hold one round" in text and "8.0 to start" in text and "5.0 to generate" in text
    suggested = float(text.rpartition("--budget ")[2].removesuffix("s"))
    # Following the advice must help.
    clock.now = 8.0
    retry = Scheduler(Budget(suggested, 0.0, clock), Shape(100, 4, 500), FinishCost(0.5, 1e-3), BatchSize(fixed=10))
    while size := retry.next_batch():
        clock.now += 0.5
        retry.observe(size, 0.5)
    assert retry.rounds >= 1

"""What is written and when, on a clock that is made up."""

from itertools import pairwise

import numpy as np

from submission.plan.estimates import Extent
from submission.plan.file_plan import STALL_RESERVE
from tests.submission.plan.made_up import batch_done, generate, make_planner, next_batch


def test_the_first_round_is_written_at_once_and_later_files_are_worth_their_while() -> None:
    planner, clock = make_planner(1000, batch=10)
    assert planner.file_plan.due() is None
    sizes, spent = [], 0.0
    while size := next_batch(planner):
        clock.now += 1.0
        batch_done(planner, size, 1.0)
        if (extent := planner.file_plan.due()) is not None:
            sizes.append(extent.rounds)
            spent += planner.file_plan.cost.mean(extent)
            planner.file_plan.placed(extent)
            planner.file_plan.wrote(extent, planner.file_plan.cost.mean(extent), planner.file_plan.cost.mean(extent))
    assert sizes[0] == 1 and all(b >= 1.05 * a for a, b in pairwise(sizes))
    assert spent <= 0.03 * 1000 and sizes[-1] > 0.8 * planner.file_plan.rounds


def test_a_job_told_to_stop_is_gone_before_a_container_is_killed() -> None:
    planner, clock = make_planner(600)
    clock.now = 50
    batch_done(planner, 500, 50)
    planner.budget.hurry()
    clock.now = 52
    planner.budget.hurry()
    assert planner.budget.usable < 5, "the first signal counts"
    clock.now = 57
    assert planner.budget.late()


def test_a_last_file_that_is_too_slow_gives_way_to_a_smaller_one() -> None:
    planner, clock = make_planner(100, copies=0)
    batch_done(planner, 100_000, 50)
    planner.file_plan.cost.observe(Extent(1000, 1000), 1.0)
    planner.file_plan.placed(Extent(1000, 1000))
    clock.now = 80
    whole = planner.file_plan.last_file()
    assert whole == Extent(10_000, 10_000)
    clock.now = 84
    assert not planner.file_plan.too_slow(whole, 80, 0.5), "it will be done at 88"
    assert planner.file_plan.too_slow(whole, 80, 0.1), "it would be done at 120"
    smaller = planner.file_plan.last_file()
    assert smaller is not None and 1000 < smaller.ipc < 8000
    clock.now = 99
    assert planner.file_plan.last_file() is None, "what is in place has to do"


def test_the_guard_takes_over_when_the_file_should_have_been_begun() -> None:
    planner, clock = make_planner(100)
    batch_done(planner, 100, 50)
    clock.now = 90
    assert not planner.overdue() and not planner.budget.late()
    clock.now = 99.3
    assert planner.overdue() and not planner.budget.late()
    clock.now = 99.9
    assert planner.budget.late()


def test_the_guard_takes_over_earlier_where_a_batch_is_late_alone() -> None:
    """Between two batches nothing is late: the main thread is about to write the file itself."""
    planner, clock = make_planner(100)
    batch_done(planner, 100, 50)
    plan = planner.file_plan
    clock.now = 100 - plan.closing_reserve - plan.cost.bound(plan.whole) - STALL_RESERVE / 2
    assert not planner.overdue()
    planner.devices[0].give(np.arange(10), clock.now)
    assert not planner.overdue(), "it was only just given"
    planner.devices[0].in_hand[0].began = -1000.0
    assert planner.overdue()


def test_time_for_what_comes_afterwards_is_kept_unless_a_signal_takes_it() -> None:
    plain, clock = make_planner(100)
    generate(plain, clock, 0.01)
    planner, clock = make_planner(100, afterwards=5.0)
    generate(planner, clock, 0.01)
    assert 4 < planner.budget.usable - plain.budget.usable < 6
    planner.budget.hurry()
    assert planner.file_plan.closing_reserve < 1

"""The clock: when a budget began, and what a signal leaves of it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from submission.plan.budget import LEAST_SHARE, Allowance, start_budget


def test_the_budget_begins_at_the_earliest_start() -> None:
    now = time.time()
    assert start_budget(100, now - 20, None).elapsed == pytest.approx(20, abs=1)
    assert start_budget(100, now - 20, now - 50).elapsed == pytest.approx(50, abs=1)
    assert start_budget(100, now + 1000).elapsed == pytest.approx(0, abs=1), "a start in the future is passed over"


TASKS = st.lists(st.tuples(st.integers(2, 1000), st.floats(0, 1)), min_size=1, max_size=6)


@given(st.floats(1, 3600), TASKS)
def test_shared_time_is_never_overrun_and_none_of_it_is_lost(seconds: float, tasks: list[tuple[int, float]]) -> None:
    """Each task takes a part of its budget: what it leaves goes to the others, by their classes. None starves."""
    allowance, now = Allowance(seconds, start=100.0, shared=True), 100.0
    for index, (_, part) in enumerate(tasks):
        to_come = [classes for classes, _ in tasks[index:]]
        budget, end = allowance.turn(to_come, now)
        assert budget.start == end.start == now and now + end.seconds == pytest.approx(100 + seconds)
        least = 0.999 * min(LEAST_SHARE, end.seconds / len(to_come))
        assert budget.seconds >= least and end.seconds - budget.seconds >= least * (len(to_come) - 1)
        if min(to_come) * end.seconds >= LEAST_SHARE * sum(to_come):
            assert budget.seconds == pytest.approx(end.seconds * to_come[0] / sum(to_come))
        assert (end is budget) == (len(to_come) == 1), "the last one has all that is left"
        now += part * budget.seconds


def test_tasks_of_as_many_classes_have_as_much_of_shared_time() -> None:
    for order in ([100, 3, 100], [100, 100, 3]):
        budget, _ = Allowance(60.0, start=0.0, shared=True).turn(order, 0.0)
        assert budget.seconds == pytest.approx(22.5)


@given(st.floats(1, 3600), TASKS)
def test_each_task_has_a_budget_from_its_turn_on(seconds: float, tasks: list[tuple[int, float]]) -> None:
    allowance, now = Allowance(seconds, start=100.0), 100.0
    for index, (_, part) in enumerate(tasks):
        budget, end = allowance.turn([classes for classes, _ in tasks[index:]], now)
        assert (budget.start, budget.seconds) == (now, seconds)
        assert end.seconds == seconds * (len(tasks) - index) and (end is budget) == (index == len(tasks) - 1)
        now += part * seconds

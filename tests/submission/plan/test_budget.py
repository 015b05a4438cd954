"""The clock: when a budget began, and what a signal leaves of it."""

import time

import pytest

from submission.plan.budget import start_budget


def test_the_budget_begins_at_the_earliest_start() -> None:
    now = time.time()
    assert start_budget(100, now - 20, None).elapsed == pytest.approx(20, abs=1)
    assert start_budget(100, now - 20, now - 50).elapsed == pytest.approx(50, abs=1)
    assert start_budget(100, now + 1000).elapsed == pytest.approx(0, abs=1), "a start in the future is passed over"

"""Durations on the command line."""

import pytest

from submission.arguments import parse_seconds
from submission.errors import UsageError


@pytest.mark.parametrize(("text", "seconds"), [("600", 600), ("90s", 90), ("10m", 600), (" 1.5m ", 90), ("0.5 s", 0.5)])
def test_budgets_are_read_in_seconds_and_minutes(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "10h", "ten", "-5", "0", "0s", "1e3", "90 s m", "nan", "inf"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_seconds(text)

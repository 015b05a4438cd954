"""The batch size is found while batches are made."""

from submission.plan.batch_size import BatchSize, pays_back


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

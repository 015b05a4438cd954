"""What is made of measurements: paces, and what files cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from submission.plan.estimates import Composition, Extent, FileCost, Pace

compositions = st.builds(Composition, st.integers(2, 200), st.integers(0, 6), st.integers(1, 2000))
costs = st.builds(FileCost, st.integers(2, 200), st.floats(0, 5), st.floats(1e-6, 0.01), st.floats(1e-6, 0.01))
extents = st.tuples(st.integers(1, 2000), st.integers(1, 2000)).map(lambda pair: Extent(min(pair), max(pair)))


@given(compositions, st.integers(1, 3000))
def test_ipc_is_images_and_copies_under_the_cap(composition: Composition, rounds: int) -> None:
    assert composition.ipc(rounds) == min(composition.cap, rounds + rounds * composition.copies)
    assert composition.ipc(rounds) <= composition.ipc(rounds + 1) <= composition.cap


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

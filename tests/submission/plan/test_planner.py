"""What is generated, on a clock that is made up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from submission.plan.estimates import Composition, Extent
from submission.plan.file_plan import CHOOSING_DOUBT, CHOOSING_MARGIN
from submission.plan.planner import BATCHES_BEFORE_GIVING_UP, Planner
from tests.submission.plan.made_up import FakeClock, batch_done, generate, make_planner, next_batch
from tools.bench import scheduler as simulator

compositions = st.builds(Composition, st.integers(2, 200), st.integers(0, 6), st.integers(1, 2000))


@given(st.floats(1, 5000), st.integers(1, 200), st.integers(1, 64), st.floats(1e-4, 1), compositions)
def test_a_plan_fits_and_one_more_round_would_not(
    seconds: float, batches: int, batch: int, pace: float, composition: Composition
) -> None:
    """With as many batches done as the cap allows, each taking what the pace says."""
    planner, clock = make_planner(
        seconds, batch=batch, classes=composition.classes, copies=composition.copies, cap=composition.cap
    )
    for _ in range(min(batches, composition.cap * composition.classes // batch)):
        clock.now += batch * pace
        batch_done(planner, batch, batch * pace)
    left, images = planner.budget.usable, planner.total_images
    done = images // composition.classes

    def total(rounds: int) -> float:
        missing = max(0, rounds * composition.classes - images)
        return planner.generate(missing) + planner.file_plan.reserve(rounds)

    plan = planner.plan()
    assert done <= plan.rounds <= max(done, composition.cap)
    assert plan.ipc == composition.ipc(plan.rounds)
    assert plan.rounds == done or total(plan.rounds) <= left
    assert plan.rounds == composition.cap or total(plan.rounds + 1) > left


@settings(max_examples=60)
@given(st.sampled_from(simulator.KINDS), st.integers(0, 10**9))
def test_no_job_on_a_simulated_machine_is_late_and_snapshots_cost_little(kind: str, seed: int) -> None:
    trace = simulator.draw_trace(kind, seed)
    outcome = simulator.run_ours(trace)
    assert outcome.end <= trace.seconds and outcome.snapshots <= 0.03


def test_a_batch_of_many_rounds_is_not_repeated_when_time_is_short() -> None:
    planner, clock = make_planner(20, batch=100, copies=0)
    clock.now = 15
    batch_done(planner, next_batch(planner), 10.0)
    assert planner.file_plan.rounds == 10
    assert next_batch(planner) <= 10, "at most the one round that still fits"


def test_the_cap_ends_a_job_early() -> None:
    planner, clock = make_planner(600, cap=7)
    generate(planner, clock, 0.01)
    assert planner.file_plan.rounds == 7 and clock.now < 30 and planner.file_plan.last_file() == Extent(7, 7)


def test_a_stall_early_on_does_not_end_the_job() -> None:
    planner, clock = make_planner(100)
    stalls = 0
    for batch in range(10000):
        size = next_batch(planner)
        if not size:
            break
        took = 20.0 if batch == 10 else 0.1
        clock.now += took
        stalls += batch_done(planner, size, took)
    unused = planner.budget.usable - planner.file_plan.reserve(planner.file_plan.rounds)
    assert 0 <= unused < 1 and stalls == 1


def test_a_pool_grows_until_it_is_time_to_choose_from_it() -> None:
    """Ten images take a second, and a second per hundred rounds to choose; the file itself stays as large as it is."""
    planner, clock = make_planner(100, cap=10, pool=10_000, choosing=0.1)
    generate(planner, clock, 0.1)
    files = planner.file_plan
    assert not planner.done and files.whole == Extent(10, 10) and files.rounds > 50
    needed = CHOOSING_DOUBT * 0.1 * files.rounds + CHOOSING_MARGIN
    assert needed < planner.budget.usable < needed + 3, "what choosing, the file and the end take, and not much more"
    files.placed(files.whole)
    assert files.spare > 0.1 * files.rounds, "for all of it"
    assert not files.last_file() and files.last_file(chosen=True) == Extent(10, 10)
    clock.now = 98.5
    assert not files.spare, "the last file has to be begun"
    planner, clock = make_planner(100, cap=10, pool=10_000, choosing=0.1, sharpening=30.0)
    generate(planner, clock, 0.1)
    assert planner.file_plan.rounds < 0.75 * files.rounds, "there is time to sharpen the choice"


def test_a_pool_ends_at_its_size_and_with_a_signal() -> None:
    planner, clock = make_planner(1000, cap=10, pool=30, choosing=0.1)
    generate(planner, clock, 0.1)
    assert planner.done and planner.file_plan.rounds == 30 and clock.now < 40
    room = planner.would_fit()
    assert room is not None and 500 < room[0] < 960, "a larger pool would have fitted, and the choice from it"
    planner, clock = make_planner(100, cap=10, pool=10_000, choosing=10.0)
    reserved = planner.file_plan.reserve(20)
    planner.budget.hurry()
    assert planner.file_plan.reserve(20) < reserved - 200, "there is no choosing"
    assert not planner.file_plan.spare


def test_a_budget_is_not_called_too_small_before_larger_batches_are_tried() -> None:
    """Images one by one would take 11 s, in batches of 16 they take 2."""
    planner, clock = make_planner(6, batch=None, classes=100, cap=500, file=(0.5, 1e-5, 1e-5))
    while size := next_batch(planner):
        took = 0.1 + 0.01 * size
        clock.now += took
        batch_done(planner, size, took)
    assert planner.file_plan.rounds >= 1


def test_a_budget_without_room_for_a_round_is_said_with_what_it_would_need() -> None:
    def tried(seconds: float) -> Planner:
        """Ready after 8 s, it makes 20 images/s."""
        planner, clock = make_planner(seconds, batch=10, classes=100, cap=500, file=(0.5, 1e-5, 1e-5), now=8.0)
        while size := next_batch(planner):
            clock.now += 0.5
            batch_done(planner, size, 0.5)
        return planner

    planner = tried(3)
    assert not planner.file_plan.rounds
    text = str(planner.too_small())
    assert "3 s cannot hold one round" in text and "8.0 to start" in text and "5.0 to generate" in text
    suggested = float(text.rpartition("--budget ")[2].removesuffix("s"))
    assert tried(suggested).file_plan.rounds >= 1, "following the advice helps"


def two_devices(seconds: float, paces: tuple[float, float], batch: int = 10) -> tuple[Planner, FakeClock]:
    """Two devices of which each has made a batch, in rounds of ten images."""
    planner, clock = make_planner(seconds, batch=batch, copies=0, devices=2)
    for device, pace in enumerate(paces):
        for _ in range(BATCHES_BEFORE_GIVING_UP):
            batch_done(planner, batch, pace * batch, device)
    return planner, clock


def test_several_devices_are_planned_for_as_fast_as_they_are_together() -> None:
    one, _ = make_planner(100, batch=10, copies=0)
    batch_done(one, 10, 1.0)
    even, _ = two_devices(100, (0.1, 0.1))
    uneven, _ = two_devices(100, (0.1, 0.4))
    assert one.images_per_second == pytest.approx(10) and even.images_per_second == pytest.approx(20)
    assert uneven.images_per_second == pytest.approx(12.5)
    assert uneven.generate(100) == pytest.approx(8)
    assert one.plan().rounds < uneven.plan().rounds < even.plan().rounds < 2.1 * one.plan().rounds


def test_no_device_is_given_what_would_not_come_back_in_time() -> None:
    planner, clock = two_devices(60, (0.1, 2.0))
    fast, slow = planner.devices
    clock.now = 30
    assert planner.next_batch(fast) == 10 and planner.next_batch(slow) == 10
    clock.now = 45
    assert planner.next_batch(fast) == 10
    assert planner.next_batch(slow) < 10, "ten would take it 20 s"
    fast.give(np.arange(140), clock.now)
    assert planner.next_batch(fast) == 0, "it has work for 14 s and would need one more for this"


def test_a_round_that_no_device_makes_alone_in_time_is_shared() -> None:
    planner, clock = two_devices(60, (0.5, 0.5))
    clock.now = 60 - planner.file_plan.reserve(7) - 3
    assert [planner.next_batch(device) for device in planner.devices] == [5, 5], "a whole one takes 5 s"


def test_what_is_late_no_longer_counts_as_in_hand() -> None:
    planner, clock = two_devices(60, (0.1, 0.1))
    device = planner.devices[0]
    device.give(np.arange(10), clock.now)
    assert planner.in_hand == 10 and device.in_hand[0].late_at == pytest.approx(clock.now + 5)
    assert [numbers.tolist() for numbers in device.hand_on()] == [list(range(10))]
    assert planner.in_hand == 0 and not device.hand_on(), "once"


def test_a_device_that_comes_late_gets_work_only_while_it_may_come_back() -> None:
    planner, clock = two_devices(60, (0.1, 0.1))
    planner.expect(3, None)
    late = planner.devices[2]
    late.loaded("late", "", {}, 10.0)
    clock.now = 30
    assert planner.next_batch(late) == 1 and planner.pays_to_start()
    clock.now = 56
    assert planner.next_batch(late) == 0 and not planner.pays_to_start()

"""A training keeps its time, whatever a step takes, and repeats itself."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from submission.errors import OutputError
from submission.log import Log
from submission.plan.budget import Budget
from tools.training import progress as module
from tools.training.images import RealImages
from tools.training.progress import (
    DONE,
    OVERRUN,
    STAGES,
    STATE,
    Progress,
    StoppedError,
    batch_for,
    begin_stage,
    load_whole,
    pick,
    restore,
    stages_after,
    steps,
)

keep = module.save  # which tests go without

BUDGET = 1000.0


class Clock:
    """One that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module", autouse=True)
def nothing_is_saved() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save", lambda _: None)
        yield


def begin(clock: Clock, stage: str = STAGES[0]) -> Progress:
    budget = Budget(BUDGET, 0.0, clock)
    progress = Progress(Path(), budget, Log("kept", budget), {}, torch.Generator(), {"seed": 0})
    begin_stage(progress, stage)
    return progress


def optimiser() -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1)], lr=torch.tensor(2.0))


def train(progress: Progress, clock: Clock, seconds: Sequence[float]) -> list[float]:
    """A stage whose steps take so many seconds, in turn; the learning rates of its steps."""
    one, rates = optimiser(), []
    for step in steps(progress, [one], 1):
        rates.append(one.param_groups[0]["lr"].item())
        clock.now += seconds[step % len(seconds)]
    return rates


@given(st.lists(st.floats(0.5, 4.0), min_size=1, max_size=20), st.floats(0, 100))
def test_all_stages_end_with_the_budget_whatever_a_step_takes(seconds: list[float], read: float) -> None:
    clock = Clock()
    clock.now = read
    progress = begin(clock)
    while (stage := progress.place.stage) != DONE:
        train(progress, clock, seconds)
        begin_stage(progress, stages_after(progress, stage)[0])
    # The last step of the last stage may be under way when its time is over; and what is left is less than the pace
    # told of a stage's last third, give or take a step of the slowest kind.
    assert clock.now <= BUDGET - progress.ending + 2 * max(seconds)
    assert clock.now >= BUDGET - progress.ending - 0.02 * BUDGET - 12 * max(seconds)


def test_a_stage_that_slows_down_is_cut_off() -> None:
    clock = Clock()
    progress = begin(clock, "diffusion")
    place = progress.place
    one = optimiser()
    for _ in steps(progress, [one], 1):
        clock.now += 1.0 if clock.now < place.began + 0.75 * (place.until - place.began) else 10.0
    assert place.ends is not None and place.step < place.ends
    assert clock.now <= place.until + OVERRUN * (place.until - place.began) + 10


def test_the_rates_rise_stay_and_fall_to_nothing() -> None:
    clock = Clock()
    rates = train(begin(clock, "vae"), clock, [0.5])
    steady = rates.index(2.0)
    falls = len(rates) - rates[::-1].index(2.0)
    assert rates[0] < 0.2 and rates[:steady] == sorted(rates[:steady])
    assert set(rates[steady:falls]) == {2.0} and 0.6 * len(rates) < falls < 0.8 * len(rates)
    assert rates[falls:] == sorted(rates[falls:], reverse=True) and rates[-1] < 0.1


def test_told_to_stop_a_stage_ends_after_its_step() -> None:
    clock = Clock()
    progress = begin(clock, "match")
    for step in steps(progress, [optimiser()], 1):
        clock.now += 1
        if step == 4:
            progress.budget.hurry()
    assert progress.place.step == 5 and progress.place.ends is None


def test_what_chance_decides_in_a_step_depends_on_the_step_alone() -> None:
    drawn = []
    for skipped in (0, 7):
        clock = Clock()
        progress = begin(clock, "distil")
        progress.place.step = skipped
        for step in steps(progress, [optimiser()], 1):
            clock.now += 1
            if step == 7:
                drawn.append(torch.rand(3, generator=progress.generator))
                break
            torch.rand(5, generator=progress.generator)
    assert torch.equal(*drawn)


def test_a_resumed_stage_sets_the_rates_that_recorded_steps_read() -> None:
    """The tensors that the optimisers were made with, and not others of the same value."""
    clock = Clock()
    progress = begin(clock, "match")
    train(progress, clock, [1.0])
    assert progress.optimisers is not None
    progress.place.step, progress.place.ends = 0, None
    one = optimiser()
    rate = one.param_groups[0]["lr"]
    next(steps(progress, [one], 1))
    assert one.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(2 / module.WARM_UP)


def test_a_resumed_training_still_has_its_warnings(tmp_path: Path) -> None:
    clock = Clock()
    before, after = begin(clock), begin(clock)
    before.log.warn("few images")
    before.output = after.output = tmp_path
    keep(before)
    after.log.warn("few images")
    after.log.warn("fewer now")
    restore(after, load_whole(tmp_path / STATE))
    after.log.warn("few images")
    assert after.log.warnings == ["few images", "fewer now"]
    later = begin(clock)
    later.output = tmp_path
    restore(later, load_whole(tmp_path / STATE))
    assert later.log.warnings == ["few images"]


def test_a_student_of_a_teacher_that_learnt_for_long_is_not_matched() -> None:
    for taught, last in ((module.MATCHED_BELOW - 1, "match"), (module.MATCHED_BELOW, DONE)):
        progress = begin(Clock(), "vae")
        progress.journal.steps["diffusion"] = taught
        begin_stage(progress, "distil")
        shares = [module.SHARES["distil"], *([module.SHARES["match"]] if last == "match" else [])]
        until = (BUDGET - progress.ending) * shares[0] / sum(shares)
        assert progress.place.until == pytest.approx(until)
        assert stages_after(progress, "distil")[0] == last


def test_a_longer_budget_gives_the_stage_at_hand_more_time_and_a_shorter_one_less(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = 10.0
    before = begin(clock, "diffusion")
    before.output = tmp_path
    before.place.falls, before.place.ends = 3, 5
    clock.now = before.place.until - 50
    keep(before)
    state = load_whole(tmp_path / STATE)
    for seconds in (BUDGET / 2, BUDGET, 2 * BUDGET):
        budget = Budget(seconds, 0.0, clock)
        begun = Progress(tmp_path, budget, Log("kept", budget), {}, torch.Generator(), {"seed": 0})
        clock.now = 10.0
        begin_stage(begun, "diffusion")
        clock.now = before.place.until - 50
        after = Progress(tmp_path, budget, Log("kept", budget), {}, torch.Generator(), {"seed": 0})
        restore(after, state)
        wanted = begun.place.until if seconds >= BUDGET else min(before.place.until, seconds - before.ending)
        assert after.place.until == pytest.approx(wanted)
        assert (after.place.ends is None) == (seconds > BUDGET), "with more time the rates have not begun to fall"


def test_a_critic_that_begins_anew_has_as_many_steps(tmp_path: Path) -> None:
    clock = Clock()
    before = begin(clock, "critic")
    before.output, before.place.ends = tmp_path, 7
    keep(before)
    for seconds in (BUDGET, 2 * BUDGET):
        after = Progress(tmp_path, Budget(seconds, 0.0, clock), before.log, {}, torch.Generator(), {"seed": 0})
        restore(after, load_whole(tmp_path / STATE))
        assert after.place.ends == 7


def test_the_state_of_another_version_is_said_to_be_one(tmp_path: Path) -> None:
    before = begin(Clock())
    before.output = tmp_path
    keep(before)
    state = load_whole(tmp_path / STATE)
    for name, other in (("journal", {"gone": 1}), ("place", {"gone": 1}), ("ending", None)):
        changed = state | {name: other}
        if other is None:
            del changed[name]
        with pytest.raises(OutputError, match="of another version of this project"):
            restore(before, changed)


def test_told_to_stop_while_a_state_is_read_it_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*_: object, **__: object) -> None:
        raise StoppedError

    monkeypatch.setattr(torch, "load", told)
    with pytest.raises(StoppedError):
        load_whole(tmp_path / STATE)


def test_every_image_has_as_much_of_the_work_whatever_its_canvas() -> None:
    images = [
        RealImages(torch.empty(count, 3, side, side), torch.tensor([count])) for count, side in ((400, 32), (100, 64))
    ]
    progress, seen = begin(Clock(), "vae"), [0, 0]
    for progress.place.step in range(2000):
        canvas = pick(progress, images)
        seen[canvas] += images[canvas].canvas ** 2 * batch_for(1024, images[canvas].canvas, torch.device("cuda"))
    assert seen[0] / 400 == pytest.approx(seen[1] / 100, rel=0.15)

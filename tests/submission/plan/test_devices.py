"""What the driver makes of a device: whether it pays to have its networks compiled, by a clock that is made up."""

import numpy as np
import pytest

from submission.plan.batch_size import BatchSize
from submission.plan.devices import COMPILE_GAIN, COMPILE_PATIENCE, COMPILE_SECONDS, PACE_BATCHES, Device, Throughput

BATCH, SECONDS = 10, 0.5
PAYS = COMPILE_SECONDS * COMPILE_GAIN / (COMPILE_GAIN - 1)  # left of generating, from where on it does


def settled() -> Device:
    """A device whose pace is known."""
    device = Device(Throughput(BatchSize(fixed=BATCH)))
    for _ in range(PACE_BATCHES):
        make(device, SECONDS)
    return device


def make(device: Device, seconds: float, now: float = 0.0) -> bool:
    """Has it make a batch that takes so long; returns whether its networks were compiled for it."""
    device.give(np.arange(BATCH), now)
    compiles = device.in_hand[0].compiles
    assert not comes_back(device, now + seconds, seconds), "no outage"
    return compiles


def comes_back(device: Device, now: float, seconds: float) -> bool:
    return device.came_back(now, seconds, BATCH, 600.0, disturbed=False, facts={"compiled": True})


@pytest.mark.parametrize(("left", "compiles"), [(PAYS + 1, True), (PAYS - 1, False)])
def test_networks_are_compiled_where_that_pays_back(left: float, compiles: bool) -> None:
    device = settled()
    device.consider_compiling(left)
    assert device.compilation.on == compiles
    assert make(device, COMPILE_SECONDS if compiles else SECONDS) == compiles
    assert make(device, SECONDS) is False, "once"
    assert device.speed.pace.mean == pytest.approx(SECONDS / BATCH), "what compiling took is no pace"


def test_before_the_pace_is_known_nothing_is_compiled() -> None:
    device = Device(Throughput(BatchSize()))
    device.consider_compiling(1e6)
    assert not device.compilation.on


@pytest.mark.parametrize(("seconds", "stays"), [(0.8 * SECONDS, True), (1.1 * SECONDS, False)])
def test_what_turns_out_slower_is_undone_for_good(seconds: float, stays: bool) -> None:
    device = settled()
    device.consider_compiling(1e6)
    make(device, COMPILE_SECONDS)
    for _ in range(PACE_BATCHES):
        make(device, seconds)
    device.consider_compiling(1e6)
    assert device.compilation.on == stays
    for _ in range(PACE_BATCHES):
        make(device, SECONDS)
        device.consider_compiling(1e6)
    assert device.compilation.on == stays


def test_a_batch_from_before_does_not_undo_it() -> None:
    """With two batches in hand, one was asked for before the networks were to be compiled."""
    device = settled()
    device.give(np.arange(BATCH), 0.0)
    device.consider_compiling(1e6)
    device.give(np.arange(BATCH), 0.0)
    comes_back(device, 1.1 * SECONDS, 1.1 * SECONDS)
    device.consider_compiling(1e6)
    assert device.compilation.on and device.in_hand[0].compiles


def test_a_device_that_begins_anew_runs_as_it_is() -> None:
    device = settled()
    device.consider_compiling(1e6)
    device.lost(again=True)
    assert not make(device, SECONDS) and not device.compilation.on


def test_a_device_that_compiles_is_given_time() -> None:
    device = settled()
    device.consider_compiling(1e6)
    device.give(np.arange(BATCH), 100.0)
    assert device.in_hand[0].late_at == 100.0 + COMPILE_PATIENCE
    assert device.wait(100.0) >= COMPILE_SECONDS

"""What the driver makes of a device: whether it pays to have its networks compiled, by a clock that is made up."""

import numpy as np
import pytest

from submission.batch_size import BatchSize
from submission.devices import COMPILE_GAIN, COMPILE_PATIENCE, COMPILE_SECONDS, PACE_BATCHES, Device

BATCH, SECONDS = 10, 0.5
PAYS = COMPILE_SECONDS * COMPILE_GAIN / (COMPILE_GAIN - 1)  # left of generating, from where on it does


def settled() -> Device:
    """A device whose pace is known."""
    device = Device(BatchSize(fixed=BATCH))
    for _ in range(PACE_BATCHES):
        make(device, SECONDS)
    return device


def make(device: Device, seconds: float, now: float = 0.0) -> bool:
    """Has it make a batch that takes so long; returns whether its networks were compiled for it."""
    device.give(np.arange(BATCH), now)
    batch = device.took(now + seconds)
    assert not device.observe(BATCH, seconds, 600.0, compiled=batch.compiles), "no outage"
    return batch.compiles


@pytest.mark.parametrize(("left", "compiles"), [(PAYS + 1, True), (PAYS - 1, False)])
def test_networks_are_compiled_where_that_pays_back(left: float, compiles: bool) -> None:
    device = settled()
    device.consider_compiling(left)
    assert device.compiled == compiles
    assert make(device, COMPILE_SECONDS if compiles else SECONDS) == compiles
    assert make(device, SECONDS) is False, "once"
    assert device.pace.mean == pytest.approx(SECONDS / BATCH), "what compiling took is no pace"


def test_before_the_pace_is_known_nothing_is_compiled() -> None:
    device = Device(BatchSize())
    device.consider_compiling(1e6)
    assert not device.compiled


@pytest.mark.parametrize(("seconds", "stays"), [(0.8 * SECONDS, True), (1.1 * SECONDS, False)])
def test_what_turns_out_slower_is_undone_for_good(seconds: float, stays: bool) -> None:
    device = settled()
    device.consider_compiling(1e6)
    make(device, COMPILE_SECONDS)
    for _ in range(PACE_BATCHES):
        make(device, seconds)
    device.consider_compiling(1e6)
    assert device.compiled == stays
    for _ in range(PACE_BATCHES):
        make(device, SECONDS)
        device.consider_compiling(1e6)
    assert device.compiled == stays


def test_a_batch_from_before_does_not_undo_it() -> None:
    """With two batches in hand, one was asked for before the networks were to be compiled."""
    device = settled()
    device.give(np.arange(BATCH), 0.0)
    device.consider_compiling(1e6)
    device.give(np.arange(BATCH), 0.0)
    device.took(1.1 * SECONDS)
    device.observe(BATCH, 1.1 * SECONDS, 600.0)
    device.consider_compiling(1e6)
    assert device.compiled and device.in_hand[0].compiles


def test_a_device_that_begins_anew_runs_as_it_is() -> None:
    device = settled()
    device.consider_compiling(1e6)
    device.forget_compiling()
    assert not make(device, SECONDS) and not device.compiled


def test_a_device_that_compiles_is_given_time() -> None:
    device = settled()
    device.consider_compiling(1e6)
    device.give(np.arange(BATCH), 100.0)
    assert device.in_hand[0].late_at == 100.0 + COMPILE_PATIENCE
    assert device.wait(100.0) >= COMPILE_SECONDS

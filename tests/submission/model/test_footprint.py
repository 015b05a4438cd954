"""What a job says that it takes: rounds lie on disk, weights and prompts in memory, batches keep within bounds."""

import subprocess
import sys
from dataclasses import replace

from submission.machine.memory import WORKING
from submission.model.checkpoint import EMBEDDED, inspect
from submission.model.footprint import memory_needed
from submission.tasks import load_task
from tests.paths import ROOT


def test_classes_prompts_and_weights_count_and_images_per_class_do_not() -> None:
    task, checkpoint = load_task("cifar100"), inspect(EMBEDDED, "test")
    needed = memory_needed(checkpoint, task, 100, 4, 2)
    assert needed < 3e9
    assert memory_needed(checkpoint, replace(task, max_ipc=10**6), 100, 4, 2) == needed
    assert memory_needed(checkpoint, replace(task, size=64), 100, 4, 2) - needed == 100 * 3 * (64**2 - 32**2)
    assert memory_needed(checkpoint, task, 800, 4, 2) - needed == 2 * 700 * checkpoint.prompt_size * 4
    assert memory_needed(checkpoint, task, 100, 2, 2) < needed
    assert memory_needed(checkpoint, task, 100, 4, 2, waiting=True) > needed, "text encoders stay"


def test_batches_may_grow_until_twice_their_memory_would_be_too_much() -> None:
    """In a process of its own: this one may hold memory that other tests have freed, and take it from there."""
    job = f"""
from submission.machine.memory import WorkingMemory
memory = WorkingMemory.watch()
assert memory.allows_more()
bytearray(b"x") * {WORKING}  # taken, and let go
assert not memory.allows_more() and memory.peak >= {WORKING}
"""
    subprocess.run([sys.executable, "-c", job], check=True, cwd=ROOT)


def test_what_the_process_that_starts_a_job_takes_is_not_the_job_s() -> None:
    job = "from submission.machine.memory import peak_memory; print(peak_memory())"
    harness = f"import subprocess, sys; held = b'x' * {WORKING}; subprocess.run([sys.executable, '-c', {job!r}])"
    said = subprocess.run([sys.executable, "-c", harness], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(said) < WORKING / 10

"""What a job will take of the machine at most, worked out before the model is loaded and kept to while it runs."""

import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

from submission.checkpoint import Checkpoint
from submission.tasks import Task

# Bytes. Python with torch, diffusers and transformers: 0.6 GB were seen.
LIBRARIES = 700 << 20
# What goes on beside the model and is done with again: a batch, or the encoding of prompts. Batches do not grow beyond.
WORKING = 1500 << 20
# Chunks of a file in the making, on each thread that makes them.
WRITING = 70 << 20
# Where a container's memory limit stands, in a file of its own control group.
LIMIT = Path("/sys/fs/cgroup/memory.max")


def memory_needed(checkpoint: Checkpoint, task: Task, prompts: int, itemsize: int, writers: int) -> int:
    """Bytes of memory that a job on a CPU takes at most, with so many prompts, `itemsize` bytes a number in the model
    and so many threads that write the file. It does not grow with the images a class: rounds lie on disk."""
    weights = {component: _weights(checkpoint, component, itemsize) for component in checkpoint.variants}
    # The text encoders are let go one after the other, before the rest is loaded.
    loaded = max(weights["text_encoder"], weights["text_encoder_2"], weights["unet"] + weights["vae"])
    embeddings = 2 * prompts * checkpoint.prompt_size * itemsize  # in parts, and then in one piece
    one_round = len(task.classes) * 3 * task.size**2
    return LIBRARIES + loaded + embeddings + one_round + WRITING * writers + WORKING


def memory_free() -> int:
    """Bytes that this process may still take: what the machine has left, or its container's limit if that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        return min(available, int(LIMIT.read_text()))
    except (OSError, ValueError):  # no control groups here, or no limit: "max"
        return available


def _weights(checkpoint: Checkpoint, component: str, itemsize: int) -> int:
    """Bytes of a component's weights: as they are in the mapped file, and as they are loaded."""
    file = checkpoint.weight_file(component).stat().st_size
    return file + file * itemsize // (2 if checkpoint.variants[component] else 4)


@dataclass
class WorkingMemory:
    """What batches take of the memory, seen from the process's peak."""

    before: int

    @classmethod
    def watch(cls) -> "WorkingMemory":
        return cls(psutil.Process().memory_info().rss)

    def allows_more(self) -> bool:
        """Whether twice of what batches have taken so far would still be within `WORKING`."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return 2 * (peak - self.before) <= WORKING

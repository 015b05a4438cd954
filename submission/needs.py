"""What a job takes of disk and memory at most, said before the model is loaded and kept to while it runs."""

from dataclasses import replace
from pathlib import Path

import psutil
import torch

from submission.budget import Shape
from submission.checkpoint import Checkpoint
from submission.errors import OutputError
from submission.output_folder import room
from submission.progress import Log
from submission.rounds import Spool
from submission.tasks import Task
from submission.work import JobConfig
from submission.working_memory import WORKING

# The part of a disk's free space that the job may plan to fill.
USABLE_ROOM = 0.95
# The part of the free memory that prompts' projections may take.
PROJECTIONS_SHARE = 0.33
# Bytes. Python with torch, diffusers and transformers: 0.6 GB were seen.
LIBRARIES = 700 << 20
# Chunks of a file in the making, on each thread that makes them.
WRITING = 70 << 20
# Where a container's memory limit stands, in a file of its own control group.
LIMIT = Path("/sys/fs/cgroup/memory.max")


def shape_that_fits(config: JobConfig, spool: Spool, log: Log) -> Shape:
    """What was asked for, with a cap that the disk has room for; says how much of it that takes. Raises OutputError."""
    shape, values = config.shape, 3 * config.task.size**2
    # The spool, the file in place and the next one, which replaces it when it is whole.
    image_bytes = values * (1 + 2 * getattr(torch, config.dtype).itemsize)
    free = room(config.output) + spool.count * shape.classes * values
    fitting = int(USABLE_ROOM * free / (image_bytes * shape.classes))
    if fitting < 1:
        raise OutputError(
            f"no room in {config.output}: one image a class of {config.task.name} takes "
            f"{image_bytes * shape.classes / 1e6:,.2f} MB there, and {free / 1e6:,.2f} MB are free: make room, or "
            "choose another --output"
        )
    cap = min(shape.cap, fitting)
    bounded = f", all there is room for of the {shape.cap} allowed" if cap < shape.cap else ""
    log.say(
        f"disk: at most {cap * shape.classes * image_bytes / 1e9:,.2f} GB in {config.output}, where {free / 1e9:,.2f} "
        f"GB are free, for IPC {cap}{bounded}"
    )
    return replace(shape, cap=cap)


def room_for_projections(
    config: JobConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, sharing: int, log: Log
) -> bool:
    """Whether the memory of the device has room for all prompts' projections. On a CPU, says how much memory this
    process takes at most, and whether that is there: `sharing` of them share the machine's."""
    prompts = sum(map(len, config.task.prompts(config.prompts)))
    projections = prompts * checkpoint.projected_size * dtype.itemsize
    if device.type == "cuda":
        return projections <= PROJECTIONS_SHARE * torch.cuda.mem_get_info(device)[0]
    free = memory_free() // sharing
    fit = projections <= PROJECTIONS_SHARE * free
    needed = memory_needed(checkpoint, config.task, prompts, dtype.itemsize, torch.get_num_threads())
    needed += projections if fit else 0
    each = f" on each of {sharing} devices" if sharing > 1 else ""
    said = f"memory: at most {needed / 1e9:.2f} GB{each}, where {free / 1e9:.2f} GB are free"
    if needed > free:
        log.warn(f"{said}: the system may end this process")
    else:
        log.say(said)
    return fit


def memory_needed(checkpoint: Checkpoint, task: Task, prompts: int, itemsize: int, writers: int) -> int:
    """Bytes of memory that a job on a CPU takes at most beside the projections of its prompts, with so many prompts,
    `itemsize` bytes a number in the model and so many threads that write the file. It does not grow with the images a
    class: rounds lie on disk."""
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

"""What a job takes of memory at most, said before the model is loaded."""

from collections.abc import Sequence

import torch

from submission.log import Log
from submission.machine.memory import WORKING, memory_free
from submission.model.checkpoint import Checkpoint
from submission.model.image_spec import ImageSpec
from submission.tasks import Task

# The part of the free memory that prompts' projections may take.
PROJECTIONS_SHARE = 0.33
# Bytes. Python with torch, diffusers and transformers: 0.6 GB were seen.
LIBRARIES = 700 << 20
# Chunks of a file in the making, on each thread that makes them.
WRITING = 70 << 20


def room_for_projections(
    image: ImageSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, sharing: int, log: Log
) -> bool:
    """Whether the memory of the device has room for all prompts' projections. On a CPU, says how much memory this
    process takes at most, and whether that is there, where `sharing` processes share the machine's."""
    phrasings = image.prompt_rows(checkpoint)
    prompts = sum(map(len, phrasings)) + checkpoint.sampling.guided
    projections = prompts * checkpoint.projected_size * dtype.itemsize
    if device.type == "cuda":
        return projections <= PROJECTIONS_SHARE * torch.cuda.mem_get_info(device)[0]
    free = memory_free() // sharing
    fit = projections <= PROJECTIONS_SHARE * free
    waiting = len(phrasings) > 1 and not fit  # as `load_generator` has it
    needed = memory_needed(checkpoint, image.task, prompts, dtype.itemsize, torch.get_num_threads(), waiting=waiting)
    needed += projections if fit else 0
    each = f" on each of {sharing} devices" if sharing > 1 else ""
    said = f"memory: at most {needed / 1e9:.2f} GB{each}, where {free / 1e9:.2f} GB are free"
    if needed > free:
        log.warn(f"{said}: the system may end this process")
    else:
        log.say(said)
    return fit


def memory_needed(
    checkpoint: Checkpoint, task: Task, prompts: int, itemsize: int, writers: int, *, waiting: bool = False
) -> int:
    """Bytes of memory that a job on a CPU takes at most beside the projections of its prompts, with so many prompts,
    `itemsize` bytes per number in the model and so many threads that write the file. It does not grow with the images
    per class: rounds lie on disk. Unless prompts are `waiting`, the text encoders are let go before the rest is
    loaded."""
    texts, networks = checkpoint.text_encoders, ["unet", "vae"]
    together = [[*texts, *networks]] if waiting else [texts, networks]
    loaded = max(_weights(checkpoint, components, itemsize) for components in together)
    embeddings = 2 * prompts * checkpoint.prompt_size * itemsize  # in parts, and then in one piece
    one_round = len(task.classes) * 3 * task.size**2
    return LIBRARIES + loaded + embeddings + one_round + WRITING * writers + WORKING


def _weights(checkpoint: Checkpoint, components: Sequence[str], itemsize: int) -> int:
    """Bytes of components' weights: as they are in the mapped files, and as they are loaded."""
    weights = [checkpoint.weights[component] for component in components]
    # A file that replaces some may hold all of them, in whichever precision.
    bytes_of = {file: 2 if one.variant or one.replaces else 4 for one in weights for file in one.files}
    return sum(size + size * itemsize // each for file, each in bytes_of.items() for size in [file.stat().st_size])

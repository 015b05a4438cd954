"""A device and the generator on it: what the job's own process and an actor of Ray both use."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from submission.checkpoint import EMBEDDED, Checkpoint, fingerprint, inspect
from submission.crowding import Crowding
from submission.decoder import FIDELITY
from submission.device import choose_device
from submission.engine import Facts, NoMemoryError
from submission.errors import CheckpointError, UsageError
from submission.generator import Generator, load_generator
from submission.needs import room_for_projections
from submission.pipeline import choose_dtype
from submission.progress import Log
from submission.work import JobConfig
from submission.working_memory import WorkingMemory

# The part of what is left of the budget that looking for a cheaper decoder may take.
DECODER_SHARE = 0.2


@dataclass(frozen=True)
class Loading:
    """What a device loads. It is a GPU or, with `kind` cpu, so many `threads` (None: all there are); `sharing` devices
    share a machine's memory. `label` is the fingerprint of the checkpoint, `embedded` whether that comes with the code.
    """

    config: JobConfig
    checkpoint: Checkpoint
    label: str
    embedded: bool
    kind: str
    threads: int | None = None
    sharing: int = 1


@dataclass
class GeneratorMaker:
    """A generator, and how its process is doing."""

    generator: Generator
    device: torch.device
    log: Log
    memory: WorkingMemory
    crowding: Crowding

    def facts(self) -> Facts:
        generator, cuda = self.generator, self.device.type == "cuda"
        facts = {
            "device": torch.cuda.get_device_name(self.device) if cuda else f"cpu ({platform.machine()})",
            "threads": torch.get_num_threads(),
            "resolution": generator.resolution,
            "unet_dtype": str(generator.sampler.dtype),
            "decoder": {
                "name": generator.decoder.rung,
                "dtype": str(generator.vae.dtype),
                "fidelity_db": dict(generator.decoder.fidelity),
                "fidelity_wanted_db": FIDELITY,
            },
            "images_regenerated": generator.regenerated,
            "peak_memory_bytes": self.memory.peak,
        }
        return facts | ({"peak_device_memory_bytes": torch.cuda.max_memory_allocated(self.device)} if cuda else {})

    def make(self, numbers: NDArray[np.int64], *, disturbed: bool) -> tuple[NDArray[np.uint8], bool, float]:
        try:
            images: NDArray[np.uint8] = self.generator.images(numbers, self.log).numpy()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise NoMemoryError from error
        grows = self.device.type != "cpu" or self.memory.allows_more()
        return images, grows, self.crowding.look(count=not disturbed)


def load_maker(loading: Loading, seconds_left: float, like: Facts | None, log: Log) -> GeneratorMaker:
    """Loads the generator onto this process's device, in the manner of the device whose facts these are.

    Raises UsageError and CheckpointError.
    """
    config, device = loading.config, choose_device(loading.kind)
    if loading.threads:
        torch.set_num_threads(loading.threads)
    checkpoint = loading.checkpoint
    dtype = getattr(torch, like["unet_dtype"].removeprefix("torch.")) if like else choose_dtype(device)
    with lack_of_memory_said(config):
        generator = load_generator(
            config.task,
            checkpoint,
            device,
            log,
            style=config.prompts,
            seed=config.seed,
            resolution=config.resolution,
            dtype=dtype,
            decoder=like["decoder"]["name"] if like else config.decoder,
            patience=DECODER_SHARE * seconds_left,
            project_prompts=room_for_projections(config, checkpoint, device, dtype, loading.sharing, log),
        )
    return GeneratorMaker(generator, device, log, WorkingMemory.watch(), Crowding())


def load_elsewhere(loading: Loading, seconds_left: float, like: Facts | None, log: Log) -> GeneratorMaker:
    """Loads the generator in a process of another machine, as it may be: it has to see the same checkpoint.

    Raises UsageError and CheckpointError.
    """
    path = EMBEDDED if loading.embedded else loading.checkpoint.path
    try:
        checkpoint = inspect(path, loading.checkpoint.source)
        label = fingerprint(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: put the checkpoint at the same path there, or on a shared disk") from error
    if label != loading.label:
        raise CheckpointError(f"{path} holds another checkpoint there: copy the one of the driver's machine")
    return load_maker(replace(loading, checkpoint=checkpoint), seconds_left, like, log)


@contextmanager
def lack_of_memory_said(config: JobConfig) -> Iterator[None]:
    """Raises UsageError where the model does not fit into memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        wish = f" at {config.resolution} px" if config.resolution else ""
        raise UsageError(f"no memory for the model and its first images{wish}: lower --resolution") from error


def out_of_memory(error: Exception) -> bool:
    """Whether it is an allocator's error; the one for the CPU has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

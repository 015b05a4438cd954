"""A device and the generator on it: what the job's own process and an actor of Ray both use."""

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from submission.engine import Facts, NoMemoryError, Placement
from submission.errors import BankoError, CheckpointError, UsageError, first_line
from submission.log import Log
from submission.machine.crowding import Crowding
from submission.machine.device import choose_device
from submission.machine.limits import cores
from submission.machine.memory import WorkingMemory
from submission.model import pipeline
from submission.model.calibration import choose_decoder
from submission.model.checkpoint import EMBEDDED, Checkpoint, fingerprint, inspect_recipe
from submission.model.decoder import load_student, save_student
from submission.model.footprint import room_for_projections
from submission.model.generator import Generator, load_generator
from submission.model.image_spec import ImageSpec


@dataclass(frozen=True)
class Loading:
    """What a device loads, to make images for a file of at most `cap` per class.

    `label` is the fingerprint of the checkpoint; `embedded` says that it comes with the code, wherever that is.
    `decoder` and `network` are what a run before has chosen and fitted.
    """

    image: ImageSpec
    cap: int
    checkpoint: Checkpoint
    label: str
    embedded: bool
    placement: Placement
    decoder: Mapping[str, Any] | None = None
    network: bytes | None = None


@dataclass
class GeneratorMaker:
    """A generator, and how its process is doing. Once compiled, it makes batches of `compiled_size` alone; where
    compiling has failed, it `refuses` to be."""

    generator: Generator
    device: torch.device
    log: Log
    memory: WorkingMemory
    crowding: Crowding
    compiled_size: int = 0
    refuses: bool = False

    @property
    def network(self) -> bytes | None:
        return save_student(self.generator.decoder)

    def facts(self) -> Facts:
        generator, cuda = self.generator, self.device.type == "cuda"
        facts = {
            "device": torch.cuda.get_device_name(self.device) if cuda else f"cpu ({platform.machine()})",
            "threads": torch.get_num_threads(),
            "resolution": generator.resolution,
            "unet_dtype": str(generator.sampler.dtype),
            "decoder": {
                "name": generator.decoder.rung,
                "dtype": str(torch.float32 if generator.decoder.student else generator.vae.dtype),
                "fidelity_db": dict(generator.decoder.fidelity),
                "fitted_to": generator.decoder.fitted_to,
            },
            "compiled": bool(self.compiled_size),
            "images_regenerated": generator.regenerated,
            "peak_memory_bytes": self.memory.peak,
        }
        return facts | ({"peak_device_memory_bytes": torch.cuda.max_memory_allocated(self.device)} if cuda else {})

    def make(
        self, numbers: NDArray[np.int64], *, disturbed: bool, compiled: bool
    ) -> tuple[NDArray[np.uint8], bool, float]:
        compiled = compiled and not self.refuses
        if compiled != bool(self.compiled_size):
            self._compile(len(numbers) if compiled else 0)
        try:
            images = self._images(numbers)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._refuse()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise NoMemoryError from error
        grows = self.device.type != "cpu" or self.memory.allows_more()
        return images, grows, self.crowding.look(count=not disturbed)

    def _images(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Those images. Where they cannot be made by compiled code, it is said, and they are made without."""
        # Another size would be compiled anew: a smaller batch is filled up.
        filled = np.append(numbers, np.repeat(numbers[-1:], max(0, self.compiled_size - len(numbers))))
        try:
            images: NDArray[np.uint8] = self.generator.images(filled, self.log).numpy()
        except Exception as error:
            # Of many classes: the compiler's, and of what tunes kernels when they first run.
            if not self.compiled_size or out_of_memory(error) or isinstance(error, BankoError):
                raise
            self._refuse()
            self.log.warn(f"torch cannot compile the model here ({first_line(error)}): it runs as it is")
            images = self.generator.images(filled, self.log).numpy()
        return images[: len(numbers)]

    def _refuse(self) -> None:
        if self.compiled_size:
            self._compile(0)
            self.refuses = True

    def _compile(self, batch: int) -> None:
        """Has the networks compiled for batches of that size or, with 0, computed as they are."""
        generator, self.compiled_size = self.generator, batch
        if not batch:
            pipeline.undo_compilation(generator.sampler.unet)
            pipeline.undo_compilation(generator.vae)
            return
        pipeline.compile_blocks(generator.sampler.unet)
        if generator.decoder.rung == "vae":
            pipeline.compile_vae(generator.vae)


def load_maker(
    loading: Loading, seconds_left: float, like: Facts | None, network: bytes | None, log: Log
) -> GeneratorMaker:
    """Loads the generator onto this process's device, in the manner of the device whose facts and fitted `network`
    (`Decoder.student`) these are.

    Raises UsageError and CheckpointError.
    """
    image, checkpoint, placement = loading.image, loading.checkpoint, loading.placement
    device, began = choose_device(placement.kind), time.perf_counter()
    if placement.threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(placement.threads or min(cores(), torch.get_num_threads()))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what it has loaded before, which would count as taken
    dtype = getattr(torch, like["unet_dtype"].removeprefix("torch.")) if like else pipeline.choose_dtype(device)
    chosen, network = (like["decoder"], network) if like else (loading.decoder, loading.network)
    try:
        room = room_for_projections(image, checkpoint, device, dtype, placement.sharing, log)
        generator = load_generator(image, checkpoint, device, log, dtype=dtype, project_prompts=room)
        with log.phase("choose decoder"):
            if chosen and chosen["fitted_to"]:
                generator.decoder = replace(
                    load_student(network or b"", chosen["name"], image.task.size, device),
                    fitted_to=chosen["fitted_to"],
                    fidelity=chosen["fidelity_db"],
                )
                log.say(f"decoder: {chosen['name']}, the network that was fitted before")
            else:
                generator.decoder = choose_decoder(
                    generator,
                    chosen["name"] if chosen else image.decoder,
                    pipeline.load_tiny(checkpoint, device, generator.vae.dtype),
                    left=seconds_left - (time.perf_counter() - began),
                    cap=loading.cap,
                    devices=placement.devices,
                    log=log,
                )
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        wish = f" at {image.resolution} px" if image.resolution else ""
        raise UsageError(f"no memory for the model and its first images{wish}: lower --resolution") from error
    return GeneratorMaker(generator, device, log, WorkingMemory.watch(), Crowding())


def load_elsewhere(
    loading: Loading, seconds_left: float, like: Facts | None, network: bytes | None, log: Log
) -> GeneratorMaker:
    """Loads the generator in a process of another machine, as it may be: it has to see the same checkpoint.

    Raises UsageError and CheckpointError.
    """
    recipe = loading.checkpoint.recipe
    recipe = replace(recipe, base=str(EMBEDDED)) if loading.embedded else recipe
    try:
        checkpoint = inspect_recipe(recipe, loading.checkpoint.source)
        label = fingerprint(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: put the checkpoint at the same path there, or on a shared disk") from error
    if label != loading.label:
        raise CheckpointError(f"{recipe.base} holds another checkpoint there: copy the one of the driver's machine")
    return load_maker(replace(loading, checkpoint=checkpoint), seconds_left, like, network, log)


def out_of_memory(error: Exception) -> bool:
    """Whether it is an allocator's error; the one for the CPU has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

"""A device that is made up, for actors: it takes its time and none of a core. Imports no torch, so that many can be
started.

The environment of the actors says how many `STUB_SECONDS` a batch takes (0.3), how many images fit into memory,
`STUB_MOST`, and where to note when each batch began and ended, `STUB_TIMES`. Of itself, each would make its images in a
manner of its own.
"""

import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from submission.engine import Facts, NoMemoryError
from submission.errors import CheckpointError
from submission.log import Log


def picture(number: int) -> NDArray[np.uint8]:
    """The image of a number, 32 px, like no other."""
    return np.random.default_rng(number).integers(0, 256, (3, 32, 32), dtype=np.uint8)


class StubMaker:
    network = None

    def __init__(self, seconds: float, like: Facts | None) -> None:
        self.seconds = seconds
        self.dtype = like["unet_dtype"] if like else f"the type of process {os.getpid()}"

    def facts(self) -> Facts:
        decoder = {"name": "vae", "dtype": "torch.float32", "fidelity_db": {}, "fitted_to": 0}
        how = {"device": "stub", "threads": 1, "resolution": 32, "unet_dtype": self.dtype, "decoder": decoder}
        return {**how, "compiled": False, "images_regenerated": 0, "peak_memory_bytes": 0}

    def make(
        self, numbers: NDArray[np.int64], *, disturbed: bool, compiled: bool
    ) -> tuple[NDArray[np.uint8], bool, float]:
        began = time.monotonic()
        if len(numbers) > int(os.environ.get("STUB_MOST", "1000")):
            raise NoMemoryError
        images = np.stack([picture(number) for number in numbers.tolist()])
        time.sleep(max(0.0, began + self.seconds - time.monotonic()))
        if folder := os.environ.get("STUB_TIMES"):
            with Path(folder, str(os.getpid())).open("a") as file:
                file.write(f"{began} {time.monotonic()}\n")
        return images, True, 1.0


def load(seconds_left: float, like: Facts | None, network: bytes | None, log: Log) -> StubMaker:
    log.say("a stub is loaded")
    return StubMaker(float(os.environ.get("STUB_SECONDS", "0.3")), like)


def load_nothing(seconds_left: float, like: Facts | None, network: bytes | None, log: Log) -> StubMaker:
    raise CheckpointError("/weights/unet is missing")

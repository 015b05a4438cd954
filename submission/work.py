"""What was asked for, and a job in the making: what the steps of the story hand to each other."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from submission.augment import PdaStyle
from submission.budget import Scheduler, Shape
from submission.checkpoint import Checkpoint
from submission.dataset_file import Recipe
from submission.decoder import Rung
from submission.estimates import Extent
from submission.image_queue import ImageQueue
from submission.manifest import Digests
from submission.progress import Log
from submission.rounds import Spool
from submission.snapshots import SnapshotWriter
from submission.tasks import PromptStyle, Task

if TYPE_CHECKING:
    from submission.engine.alone import Alone
    from submission.engine.fleet import Fleet


@dataclass(frozen=True)
class JobConfig:
    """What was asked for. `copies` an image at most, `cap` images a class at most, `resolution` in pixels; None stands
    for the checkpoint's own resolution, and for the batch size that measures best.

    `device` is `auto`, `cpu` or `cuda`, and `devices` how many of that kind; None is every GPU, or one CPU. `cluster`
    is the address of Ray's, or `auto`.
    """

    task: Task
    output: Path
    model: str
    resolution: int | None
    copies: int
    pda: PdaStyle
    prompts: PromptStyle
    decoder: Rung | Literal["auto"]
    cap: int
    seed: int
    batch_size: int | None
    dtype: str
    device: str
    devices: int | None = None
    cluster: str | None = None
    compiles: bool = True
    resume: bool = False

    @property
    def shape(self) -> Shape:
        return Shape(len(self.task.classes), 0 if self.pda == "none" else self.copies, self.cap)

    @property
    def dataset(self) -> Path:
        return self.output / f"{self.task.name}.pt"

    def recipe(self, extent: Extent) -> Recipe:
        return Recipe(self.task, extent.ipc, self.pda, self.seed, getattr(torch, self.dtype))


@dataclass
class Work:
    """A job in the making: what generates, what decides, what is on disk, and the plans that were announced.

    `placing` is held to put a file in place and to write the manifest of the one that is. `progress` has the images
    that were made, and the batch size, at some seconds of the budget; at second `first_image` there was one.
    `trouble` is what ended the last device that was given up.
    """

    config: JobConfig
    checkpoint: Checkpoint
    digests: Digests
    engine: "Alone | Fleet"
    spool: Spool
    queue: ImageQueue
    scheduler: Scheduler
    log: Log
    writer: SnapshotWriter = field(default_factory=SnapshotWriter)
    placing: threading.RLock = field(default_factory=threading.RLock)
    plans: list[dict[str, float]] = field(default_factory=list)
    progress: list[tuple[float, int, int]] = field(default_factory=list)
    trouble: Exception | None = None
    first_image: float | None = None
    sheet_drawn: bool = False
    finished: bool = False

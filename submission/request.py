"""What was asked for."""

from dataclasses import dataclass
from pathlib import Path

import torch

from submission.dataset.augment import PdaStyle
from submission.dataset.dataset_file import FileSpec
from submission.model.checkpoint import Checkpoint
from submission.model.choice import ModelRequest
from submission.model.image_spec import ImageSpec
from submission.plan.estimates import Composition, Extent

# Rounds that images are chosen from at most, unless more are asked for: features of a class are held in memory.
MOST_POOL = 10_000
# Images per class up to which they are chosen without being asked for.
MOST_CHOSEN = 100


@dataclass(frozen=True)
class DeviceRequest:
    """Where images are made: `count` devices of a `kind`, `auto`, `cpu` or `cuda`; None is every GPU, or one CPU.

    `cluster` is the address of a Ray cluster, or `auto`. `batch_size` None is what measures best. `compiles` allows the
    networks to be compiled.
    """

    kind: str = "auto"
    count: int | None = None
    cluster: str | None = None
    batch_size: int | None = None
    compiles: bool = True


@dataclass(frozen=True)
class JobRequest:
    """Which images, by which model, and the file: its composition at most, and `dtype` of its numbers. `resume` goes on
    from the rounds of an interrupted run. `tasks` are the names of all that the run is asked for."""

    image: ImageSpec
    model: ModelRequest
    output: Path
    composition: Composition
    pda: PdaStyle
    dtype: str
    devices: DeviceRequest
    resume: bool = False
    tasks: tuple[str, ...] = ()

    @property
    def dataset(self) -> Path:
        return self.output / f"{self.image.task.name}.pt"

    @property
    def spool(self) -> Path:
        return self.output / f".{self.image.task.name}.spool"

    @property
    def wishes(self) -> dict[str, object]:
        """What was asked for, for the manifest, as far as no checkpoint has a say in it."""
        image = self.image
        return {
            "task": image.task.name,
            "model": self.model.name,
            "steps": self.model.steps,
            "guidance": list(self.model.guidance) if self.model.guidance else None,
            "prompts_file": str(image.prompts_file) if image.prompts_file else None,
            "classes": len(image.task.classes),
            "size": image.task.size,
            "mean": list(image.task.mean),
            "std": list(image.task.std),
            "max_ipc": self.composition.cap,
            "copies_per_image": self.composition.copies,
            "max_pool": self.composition.pool,
            "pda": self.pda,
            "seed": image.seed,
            "dtype": self.dtype,
        }

    def facts(self, checkpoint: Checkpoint) -> dict[str, object]:
        """What was asked for, and what the checkpoint makes of it, for the manifest. Raises CheckpointError."""
        sampling = checkpoint.sampling
        identity = self.image.identity(checkpoint)
        identity.pop("decoder")  # which may be `auto`: the manifest has the one that was taken
        return {
            **self.wishes,
            "prompts": self.image.style(checkpoint),
            "sampling": {
                "scheduler": sampling.scheduler or checkpoint.configs["scheduler"].get("_class_name"),
                "settings": dict(sampling.settings),
                "steps": sampling.count,
                "timesteps": list(sampling.timesteps),
                "guidance": list(sampling.guidance),
                "negative": sampling.negative,
                "eta": sampling.eta,
            },
            "identity": identity,
        }

    def file_spec(self, extent: Extent) -> FileSpec:
        return FileSpec(self.image.task, extent.ipc, self.pda, self.image.seed, getattr(torch, self.dtype))

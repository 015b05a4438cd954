"""What decides an image, beside the checkpoint, its class and its round."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from submission.errors import UsageError
from submission.model.checkpoint import Checkpoint, fingerprint
from submission.model.decoder import Rung
from submission.tasks import PromptStyle, Task


@dataclass(frozen=True)
class ImageSpec:
    """Images of a task's classes, asked for in the words of a prompt style, from noise of a seed.

    `prompts` None is the style that suits the checkpoint: `diverse` wherever that can be had, but for those that were
    trained for classes, which do not follow phrasings. `prompts_file` is where `own` ones are from.
    `resolution` is the side of the canvas in pixels, None the checkpoint's own; `decoder` the way from latents to
    pixels, `auto` the one that is worth most on the device (`submission.model.calibration`).
    """

    task: Task
    prompts: PromptStyle | None = "described"
    seed: int = 0
    resolution: int | None = None
    decoder: Rung | Literal["auto"] = "auto"
    prompts_file: Path | None = None

    def canvas(self, checkpoint: Checkpoint) -> int:
        """The side of the canvas in pixels. Raises UsageError where the checkpoint cannot have it."""
        if self.resolution and self.resolution % checkpoint.resolution_step:
            raise UsageError(
                f"--resolution {self.resolution}: this checkpoint needs a multiple of {checkpoint.resolution_step}"
            )
        return self.resolution or checkpoint.resolution_for(self.task.size)

    def style(self, checkpoint: Checkpoint) -> PromptStyle:
        return self.prompts or ("diverse" if self.task.has_phrasings and checkpoint.classes is None else "described")

    def prompt_rows(self, checkpoint: Checkpoint) -> list[list[str]]:
        """Prompts as `[phrasing][class]`, of which round r takes row `r % len`. Raises UsageError."""
        return self.task.prompts(self.style(checkpoint))

    def identity(self, checkpoint: Checkpoint) -> dict[str, str]:
        """All of it, and the checkpoint, by the name of what a person would have to change."""
        task = self.task
        names = [c.name for c in task.classes]
        return {
            "checkpoint": fingerprint(checkpoint),
            "task": f"{task.name} ({len(task.classes)} classes at {task.size} px, {_digest(names)})",
            "seed": str(self.seed),
            "resolution": f"{self.canvas(checkpoint)} px",
            "decoder": self.decoder,
            "sampling": f"{checkpoint.sampling} ({_digest(asdict(checkpoint.sampling))})",
            "prompts": f"{self.style(checkpoint)} ({_digest(self.prompt_rows(checkpoint))})",
        }


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

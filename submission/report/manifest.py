"""Parts of the manifest that no other room states: which checkpoint, which versions. docs/output.md lists all of it."""

import importlib.metadata
import platform
import sys
import threading

from submission.model.checkpoint import Checkpoint, not_as_published, weight_digests
from submission.model.choice import recognise

# Bytes of a manifest at most: that of a thousand classes takes about one million.
MOST_BYTES = 1 << 26
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "safetensors")


class Digests:
    """SHA-256 of a checkpoint's weight files, worked out on a thread while the job goes on."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files: dict[str, str] | None = None
        self._checkpoint = checkpoint
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._files = weight_digests(self._checkpoint)

    def wait(self, seconds: float) -> dict[str, str] | None:
        """The digests by file, or None if they are not known after so many more seconds."""
        self._thread.join(seconds)
        return self._files

    def others(self) -> list[str]:
        """The files, as far as these are known, that are not those which the model's recipe names."""
        return not_as_published(self._checkpoint, self.wait(0) or {})

    def facts(self) -> dict[str, object]:
        """Which checkpoint it is."""
        digests = self.wait(0)
        return {
            "checkpoint": {
                "source": self._checkpoint.source,
                "path": str(self._checkpoint.path),
                "sha256": digests,
                "recognised": digests and recognise(digests),
            }
        }


def machine() -> dict[str, object]:
    """Versions of what the job rests on."""
    libraries = [*LIBRARIES, "ray"] if "ray" in sys.modules else LIBRARIES
    return {
        "python": platform.python_version(),
        "versions": {library: importlib.metadata.version(library) for library in libraries},
    }

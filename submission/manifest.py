"""The manifest's supporting facts: what the checkpoint is, what the machine is, and writing it down whole."""

import importlib.metadata
import json
import platform
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from submission.checkpoint import Checkpoint, identity
from submission.errors import cannot_write
from submission.output_folder import unfinished

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "safetensors")


class Digests:
    """SHA-256 of a checkpoint's weight files, worked out on a thread while the job goes on."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files: dict[str, str] | None = None
        self._checkpoint = checkpoint
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._files = identity(self._checkpoint)

    def wait(self, seconds: float) -> dict[str, str] | None:
        """The digests by file, or None if they are not known after so many more seconds."""
        self._thread.join(seconds)
        return self._files


def machine() -> dict[str, object]:
    """Versions of what the job rests on."""
    libraries = [*LIBRARIES, "ray"] if "ray" in sys.modules else LIBRARIES
    return {
        "python": platform.python_version(),
        "versions": {library: importlib.metadata.version(library) for library in libraries},
    }


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes `content` to `path` as `write_whole` does."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes `path` whole or not at all. Raises OutputError."""
    scratch = unfinished(path)
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise cannot_write(path, error, len(content)) from error
    finally:
        with suppress(OSError):
            scratch.unlink()

"""The manifest's supporting facts: what the checkpoint is, what the machine is, and writing it down whole."""

import importlib.metadata
import json
import platform
import resource
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from submission.checkpoint import Checkpoint, identity
from submission.errors import OutputError

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


def machine(device: torch.device) -> dict[str, object]:
    """Versions, device, and peak memory so far in bytes (of the process; on CUDA also of the device)."""
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if device.type == "cuda":
        facts["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return facts


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes `content` to `path` whole or not at all. Raises OutputError."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes `path` whole or not at all. Raises OutputError."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        needed = len(content) / 1e6
        raise OutputError(f"cannot write {path} ({error.strerror}): {needed:.2f} MB are needed there") from error

"""The manifest's supporting facts: what the checkpoint is, what the machine is, and writing it down whole."""

import importlib.metadata
import json
import platform
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from submission.checkpoint import Checkpoint, identity
from submission.errors import cannot_write
from submission.output_folder import unfinished

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "safetensors")


class Digests:
    """SHA-256 of a checkpoint's weight files, worked out on a thread while the job goes on.

    Only the rank that writes the manifest needs them: it begins, at the latest when it waits for them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files: dict[str, str] | None = None
        self._checkpoint = checkpoint
        self._thread = threading.Thread(target=self._work, daemon=True)

    def begin(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def _work(self) -> None:
        self._files = identity(self._checkpoint)

    def wait(self, seconds: float) -> dict[str, str] | None:
        """The digests by file, or None if they are not known after so many more seconds."""
        self.begin()
        self._thread.join(seconds)
        return self._files


def machine(device: torch.device) -> dict[str, object]:
    """Versions, device, and on CUDA its peak memory so far in bytes."""
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return facts


def job_of(manifest: Path) -> str | None:
    """The name of the job that wrote a manifest; None where there is none, or none to be read."""
    try:
        name = json.loads(manifest.read_text())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name)


def write_json(path: Path, content: Mapping[str, object], check: Callable[[], None] = lambda: None) -> None:
    """Writes `content` to `path` as `write_whole` does."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode(), check)


def write_whole(path: Path, content: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Writes `path` whole or not at all; `check` may still prevent it, once all is written. Raises OutputError."""
    scratch = unfinished(path)
    try:
        scratch.write_bytes(content)
        check()
        scratch.replace(path)
    except OSError as error:
        raise cannot_write(path, error, len(content)) from error
    finally:
        with suppress(OSError):
            scratch.unlink()

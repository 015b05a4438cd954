"""What the job and `evaluate` leave in JSON: a run's manifest, and results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from submission.errors import InputFileError
from submission.tasks import Task


def read_manifest(path: Path) -> dict[str, Any]:
    """A run's manifest. Raises InputFileError."""
    manifest = read_json(path)
    if not {"task", "ipc", "progress"} <= manifest.keys():
        raise InputFileError(f"{path}: not the manifest of a run, or of one by an older version")
    return manifest


def check_it_describes(manifest: Mapping[str, Any], task: Task, images: Tensor) -> None:
    """Raises InputFileError where the manifest is that of another file."""
    described = (manifest["task"], len(task.classes) * manifest["ipc"])
    if described != (task.name, len(images)):
        raise InputFileError(
            f"the manifest tells of {described[1]:,} images for {described[0]}, and these are {len(images):,} for "
            f"{task.name}: it belongs to another file"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises InputFileError."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputFileError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputFileError(f"{path}: not a manifest or results, but a {type(content).__name__}")
    return content

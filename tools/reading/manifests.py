"""What the job and `evaluate` leave in JSON: a run's manifest, and results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from submission.errors import InputFileError, first_line
from submission.machine.disk import read_bytes
from submission.report.manifest import MOST_BYTES
from submission.report.page import render
from submission.tasks import Task


def read_manifest(path: Path) -> dict[str, Any]:
    """A run's manifest, of which `task` is a name and `ipc` a number. Raises InputFileError."""
    manifest = read_json(path)
    if not isinstance(manifest.get("task"), str) or type(manifest.get("ipc")) is not int or "progress" not in manifest:
        raise InputFileError(f"{path}: not the manifest of a run, or of one by an older version")
    return manifest


def page_about(
    path: Path, manifest: Mapping[str, Any], task: Task, images: Tensor, results: Mapping[str, Any] | None
) -> bytes:
    """The page about a run (`submission.report.page.render`), whose manifest was read from `path`. Raises
    InputFileError where the manifest is that of another file, or where it or the results lack what the page shows."""
    described = (manifest["task"], len(task.classes) * manifest["ipc"])
    if described != (task.name, len(images)):
        raise InputFileError(
            f"the manifest tells of {described[1]:,} images for {described[0]}, and these are {len(images):,} for "
            f"{task.name}: it belongs to another file"
        )
    try:
        return render(task, manifest, images, results).encode()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, jinja2.TemplateError) as error:
        # Dozens of facts go into it, and each may be missing or of another kind: an older version had others.
        raise InputFileError(f"{path}: not the manifest of a run by this version ({first_line(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises InputFileError."""
    try:
        content = json.loads(read_bytes(path, MOST_BYTES))
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputFileError(f"{path}: not a manifest or results, but a {type(content).__name__}")
    return content

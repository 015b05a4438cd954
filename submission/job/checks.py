"""What can be known of tasks before they are begun: of several, and of a file that a run before has left."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from submission.dataset.rounds import is_empty
from submission.job.files import USABLE_ROOM, bytes_per_ipc, check_place, no_room
from submission.machine.device import choose_devices
from submission.machine.disk import claimed, read_bytes, room
from submission.model.checkpoint import Checkpoint
from submission.model.choice import choose
from submission.plan.estimates import Extent
from submission.report.manifest import MOST_BYTES
from submission.request import JobRequest


def checkpoint_of_all(requests: Sequence[JobRequest]) -> Checkpoint | None:
    """The checkpoint that the requests have in common, or None: who has not joined a cluster does not know its devices.
    Raises UsageError and CheckpointError."""
    devices = requests[0].devices
    if devices.cluster is not None:
        return None
    kind, _ = choose_devices(devices.kind, devices.count)
    return choose(requests[0].model, cuda=kind == "cuda")


def check_all(requests: Sequence[JobRequest], checkpoint: Checkpoint | None) -> None:
    """Finds out whether there are prompts for all classes, and room for all files with one image per class at least.
    Raises UsageError, CheckpointError and OutputError."""
    folder = requests[0].output
    if checkpoint is not None:
        for request in requests:
            request.image.canvas(checkpoint)
            request.image.prompt_rows(checkpoint)
    with claimed(folder):
        for request in requests:
            check_place(request)
        free = room(folder)
        if sum(map(bytes_per_ipc, requests)) > USABLE_ROOM * free:
            raise no_room(requests, free)


def made_before(request: JobRequest, checkpoint: Checkpoint | None) -> int | None:
    """The images per class of the file, if a run before has made it whole and as this request asks for: it left no
    rounds to go on from, and its manifest says the same."""
    manifest = _manifest_of_file(request, checkpoint) if is_empty(request.spool) else None
    return int(manifest["ipc"]) if manifest else None


def file_in_place(request: JobRequest, checkpoint: Checkpoint) -> Extent | None:
    """What the file in the output folder holds, if it is whole and was made as this request asks for, of the images
    made first."""
    manifest = _manifest_of_file(request, checkpoint)
    return Extent(manifest["rounds"], manifest["ipc"]) if manifest and manifest.get("pool") is None else None


def _manifest_of_file(request: JobRequest, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """What is told of the file in the output folder; None where that is not true of it, or not what is asked for."""
    image, task = request.image, request.image.task
    try:
        manifest = json.loads(read_bytes(request.dataset.with_suffix(".json"), MOST_BYTES))
        made, extent = (manifest["resolution"], manifest["decoder"]["name"]), (manifest["rounds"], manifest["ipc"])
        # A killed job may have put a file in place and not yet told of it.
        file = torch.load(request.dataset, mmap=True, weights_only=True)
        shape, dtype = tuple(file.shape), file.dtype
    except Exception:  # noqa: BLE001  of any class: both files may be anything
        return None
    wanted = request.facts(checkpoint) if checkpoint is not None else request.wishes
    same = all(manifest.get(name) == value for name, value in wanted.items())
    same &= image.resolution in (None, made[0]) and image.decoder in ("auto", made[1])
    same &= all(type(number) is int and number > 0 for number in extent)
    same &= shape == (len(task.classes) * extent[1], 3, task.size, task.size) and dtype == getattr(torch, request.dtype)
    return manifest if same else None

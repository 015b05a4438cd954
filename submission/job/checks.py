"""What can be known of tasks before they are begun: of several, and of a file that a run before has left."""

import json
from collections.abc import Sequence

from submission.job.files import USABLE_ROOM, bytes_per_ipc, check_place, no_room
from submission.machine.device import choose_devices
from submission.machine.disk import claimed, room
from submission.model.checkpoint import Checkpoint
from submission.model.choice import choose
from submission.plan.estimates import Extent
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
    found = None if request.spool.exists() else file_in_place(request, checkpoint)
    return found.ipc if found else None


def file_in_place(request: JobRequest, checkpoint: Checkpoint | None) -> Extent | None:
    """What the file in the output folder holds, if its manifest says that it was made as this request asks for."""
    image = request.image
    if not request.dataset.is_file():
        return None
    try:
        manifest = json.loads(request.dataset.with_suffix(".json").read_bytes())
        made = manifest["resolution"], manifest["decoder"]["name"]
        extent = Extent(int(manifest["rounds"]), int(manifest["ipc"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    wanted = request.facts(checkpoint) if checkpoint is not None else request.wishes
    same = all(manifest.get(name) == value for name, value in wanted.items())
    same &= image.resolution in (None, made[0]) and image.decoder in ("auto", made[1])
    return extent if same else None

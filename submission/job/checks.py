"""What can be known of several tasks before the first of them is begun."""

import json
from collections.abc import Sequence

from submission.job.files import USABLE_ROOM, bytes_per_ipc, check_place, no_room
from submission.machine.device import choose_devices
from submission.machine.disk import claimed, room
from submission.model.checkpoint import Checkpoint
from submission.model.choice import choose
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
    image = request.image
    if request.spool.exists() or not request.dataset.is_file():
        return None
    try:
        manifest = json.loads(request.dataset.with_suffix(".json").read_bytes())
        made = manifest["resolution"], manifest["decoder"]["name"], int(manifest["ipc"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    wanted = request.facts(checkpoint) if checkpoint is not None else request.wishes
    same = all(manifest.get(name) == value for name, value in wanted.items())
    same &= image.resolution in (None, made[0]) and image.decoder in ("auto", made[1])
    return made[2] if same else None

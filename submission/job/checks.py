"""What can be known of several tasks before the first of them is begun."""

from collections.abc import Sequence

from submission.job.files import USABLE_ROOM, bytes_per_ipc, check_place, no_room
from submission.machine.device import choose_devices
from submission.machine.disk import claimed, room
from submission.model.choice import choose
from submission.request import JobRequest


def check_all(requests: Sequence[JobRequest]) -> None:
    """Finds out whether there are devices and a checkpoint, prompts for all classes, and room for all files, with one
    image per class at least. Raises UsageError, CheckpointError and OutputError."""
    devices, folder = requests[0].devices, requests[0].output
    if devices.cluster is None:  # only who has joined a cluster knows what there is
        kind, _ = choose_devices(devices.kind, devices.count)
        checkpoint = choose(requests[0].model, cuda=kind == "cuda")
        for request in requests:
            request.image.canvas(checkpoint)
            request.image.prompt_rows(checkpoint)
    with claimed(folder):
        for request in requests:
            check_place(request)
        free = room(folder)
        if sum(map(bytes_per_ipc, requests)) > USABLE_ROOM * free:
            raise no_room(requests, free)

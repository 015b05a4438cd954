"""What a job takes of the disk at most, said before the model is loaded and kept to while it runs."""

from dataclasses import replace

import torch

from submission.dataset.rounds import Spool
from submission.errors import OutputError
from submission.log import Log
from submission.machine.disk import room
from submission.plan.estimates import Composition
from submission.request import JobRequest

# The part of a disk's free space that the job may plan to fill.
USABLE_ROOM = 0.95


def composition_that_fits(request: JobRequest, spool: Spool, log: Log) -> Composition:
    """What was asked for, with a cap that the disk has room for; says how much of it that takes. Raises OutputError."""
    wanted, values = request.composition, 3 * request.image.task.size**2
    # The spool, the file in place and the next one, which replaces it when it is whole.
    image_bytes = values * (1 + 2 * getattr(torch, request.dtype).itemsize)
    free = room(request.output) + spool.count * wanted.classes * values
    fitting = int(USABLE_ROOM * free / (image_bytes * wanted.classes))
    if fitting < 1:
        raise OutputError(
            f"no room in {request.output}: one image per class of {request.image.task.name} takes "
            f"{image_bytes * wanted.classes / 1e6:,.2f} MB there, and {free / 1e6:,.2f} MB are free: make room, or "
            "choose another --output"
        )
    cap = min(wanted.cap, fitting)
    bounded = f", all there is room for of the {wanted.cap} allowed" if cap < wanted.cap else ""
    log.say(
        f"disk: at most {cap * wanted.classes * image_bytes / 1e9:,.2f} GB in {request.output}, where "
        f"{free / 1e9:,.2f} GB are free, for IPC {cap}{bounded}"
    )
    return replace(wanted, cap=cap)

"""One training on several devices, a process for each: equal networks, batches of their own, gradients that accelerate
averages. Where there is one process, nothing here does anything."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor

from submission.errors import UsageError, first_line

# Seconds that the other processes have left when one has ended, to do so themselves.
PATIENCE = 3.0


def join(*, cpu: bool) -> torch.device:
    """Makes this process one of those that a launcher started, or the only one; returns its device. Raises
    UsageError."""
    try:
        device: torch.device = PartialState(cpu=cpu).device
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"the environment has some of a launcher's variables ({first_line(error)[:80]}): start the command by "
            "torchrun or accelerate launch, or unset RANK, LOCAL_RANK, WORLD_SIZE and those of MPI"
        ) from error
    return device


def leave() -> None:
    """Ends what `join` began, when all have come so far: a process that ends with the threads of it may abort."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


@contextmanager
def the_first_speaks() -> Iterator[None]:
    """A context in which an error of another process than the first waits before it gets out: what fails in all is to
    be said once, and `run_together` ends the others meanwhile."""
    try:
        yield
    except Exception:
        if not is_first():
            time.sleep(4 * PATIENCE)
        raise


def is_first() -> bool:
    """Whether this is the process that decides, and writes files."""
    return bool(PartialState().is_main_process)


def number() -> int:
    """Which of the processes this is."""
    return int(PartialState().process_index)


def count() -> int:
    """How many processes train."""
    return int(PartialState().num_processes)


def first_before_others() -> AbstractContextManager[None]:
    """A context that the first process leaves before the others enter it."""
    context: AbstractContextManager[None] = PartialState().main_process_first()
    return context


def agreed(value: Any) -> Any:
    """The first process's value, in all of them."""
    if count() == 1:
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces the gradients by their mean over the processes."""
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    parts = torch.split(together, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def run_together(command: Sequence[str], processes: int) -> int:
    """Runs a command in so many processes of this machine, which find each other as torchrun's do; returns the exit
    code of the first that fails, or 0. Signals to finish are passed on; where one ends, the others have to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]

    def tell(number: int) -> None:
        for process in started:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: tell(number))
    while all(process.poll() is None for process in started):
        time.sleep(0.1)
    # They leave each other together (`leave`): who is not gone soon waits for one that is, for ever.
    until = time.monotonic() + PATIENCE
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
    codes = [process.poll() for process in started]
    tell(signal.SIGKILL)
    return next((code for code in codes if code), 0)

"""One training on several devices, a process for each, as accelerate launches them: equal networks, batches of their
own, gradients that are averaged. Where there is one process, nothing here does anything."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor


def is_first() -> bool:
    """Whether this is the process that decides, and writes files."""
    return bool(PartialState().is_main_process)


def number() -> int:
    """Which of the processes this is."""
    return int(PartialState().process_index)


def count() -> int:
    """How many processes train."""
    return int(PartialState().num_processes)


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

"""What of the machine is this rank's: a GPU of its own, or its part of the cores."""

import os

import torch

from submission.errors import UsageError
from submission.progress import Log
from submission.ranks import Place, lone_process_of_many


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` is a GPU where there is one, another for each rank on this machine. Raises UsageError where one is asked
    for and there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or check the driver")
    if not available or wanted == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def share_out(device: torch.device, place: Place, log: Log) -> None:
    """Gives this rank its part of the machine's cores, unless OMP_NUM_THREADS says what each gets, and says where ranks
    are in each other's way."""
    if place.ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_ranks))  # of all cores this process may use
    units = (os.cpu_count() or 1) if device.type == "cpu" else torch.cuda.device_count()
    if place.local_ranks > units and place.local_rank == 0:
        log.warn(f"{place.local_ranks} processes share {units} {'cores' if device.type == 'cpu' else 'GPUs'}")
    if lone_process_of_many():
        log.warn("accelerate launch started this process alone; for several on a CPU, use --processes or torchrun")

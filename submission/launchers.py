"""Launchers that start several processes of a command: torchrun, `accelerate launch`, srun and MPI's. One drives all
devices of the machine, so the others are not needed."""

import os

from submission.errors import UsageError

# How each says how many processes there are, how many of them on this machine, and which one this is.
LAUNCHERS = (
    ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"),  # torchrun and accelerate
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_RANK"),
    ("PMI_SIZE", "MPI_LOCALNRANKS", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "", "SLURM_PROCID"),
)


def rank_and_count() -> tuple[int, int]:
    """Which process this is, and of how many that a launcher started on this machine.

    Raises UsageError where it started some on others, too, and says what does instead.
    """
    for size, local_size, rank in LAUNCHERS:
        if (processes := _number(size, 1)) > 1:
            machines = _number("SLURM_STEP_NUM_NODES", 1) if not local_size else 1
            if machines > 1 or (local_size and _number(local_size, processes) < processes):
                raise UsageError(
                    f"{processes} processes were started on several machines, and one is to drive them all: as with "
                    "Slurm, srun --ntasks-per-node 1 ray symmetric-run --address HEAD:6379 --min-nodes MACHINES -- "
                    "./run.sh TASK --cluster auto"
                )
            return _number(rank, 0), processes
    return 0, 1


def _number(name: str, otherwise: int) -> int:
    """The whole number in the environment under that name. Raises UsageError."""
    text = os.environ.get(name, str(otherwise))
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"{name}={text} in the environment: launchers put a whole number there; unset it") from error

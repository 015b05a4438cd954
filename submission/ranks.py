"""Which of how many processes this one is, and of which job: told by the launcher through the environment.

Nothing is asked of the other processes. A process group, as `torch.distributed` or accelerate's `PartialState` would
form, hangs where one of them never arrives, and nobody here needs one: ranks meet in the output folder.
"""

import os
import uuid
from dataclasses import dataclass

from submission.errors import UsageError

# What srun tells its tasks, by the names that accelerate reads. How many of them share a machine is left out: Slurm
# gives each its own cores and GPUs.
SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
}
# Where accelerate looks for the number of processes: torchrun's and accelerate's own, then those of MPI's launchers.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Together these tell two jobs apart that run at the same time.
JOB_NAMES = ("BANKO_JOB", "SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `ranks` in the job of that name, and `local_rank` of the `local_ranks` on this machine."""

    job: str
    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1


def find_place() -> Place:
    """This process's place, in a job of its own where no launcher says otherwise. Raises UsageError.

    accelerate, which takes seconds to import, is asked only where there is more than one process.
    """
    environment = os.environ
    if "WORLD_SIZE" not in environment and _number(SLURM["WORLD_SIZE"]) > 1:
        environment.update({name: environment[theirs] for name, theirs in SLURM.items()})
    if all(_number(name) == 1 for name in WORLD_SIZES):
        return Place(uuid.uuid4().hex)
    from accelerate.utils import get_cpu_distributed_information  # noqa: PLC0415  # slow to import

    job = "/".join(environment.get(name, "") for name in JOB_NAMES)
    if not job.strip("/"):
        raise UsageError("the launcher gives its processes no name in common: set BANKO_JOB to one for each job")
    told = get_cpu_distributed_information()
    if not 0 <= told.rank < told.world_size:
        raise UsageError(f"the launcher says that this is rank {told.rank} of {told.world_size}")
    return Place(job, told.rank, told.world_size, told.local_rank, told.local_world_size)


def _number(name: str) -> int:
    """The whole number in the environment under that name, 1 where there is none. Raises UsageError."""
    text = os.environ.get(name, "1")
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"{name}={text} in the environment: launchers put a whole number there; unset it") from error


def lone_process_of_many() -> bool:
    """Whether `accelerate launch` was asked for several processes and started this one alone, as it does with `--cpu`:
    it then sets the address where they would meet, and no rank."""
    environment = os.environ
    return "MASTER_PORT" in environment and "ACCELERATE_MIXED_PRECISION" in environment and "RANK" not in environment

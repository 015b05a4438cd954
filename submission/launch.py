"""`--processes N`: so many ranks of one job as child processes, told their places as torchrun would tell them.

Unlike torchrun's agent, this one leaves the others alone when a rank dies.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from submission.guard import SIGNALS
from submission.ranks import find_place


def launch(processes: int, arguments: Sequence[str], started: float) -> int:
    """Runs the command line `arguments` as so many ranks and returns the job's exit code.

    A rank returns 0 only where the file is complete, so the job does where one of its ranks did; else its code is that
    of the first that failed. `started` is when the job began, in Unix seconds. Where this is itself one of several
    processes, one a machine, each becomes so many ranks. Raises UsageError.
    """
    place = find_place()
    told: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _: object) -> None:
        told.append(number)
        for child in children:
            child.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, hand_on)
    for index in range(processes):
        environment = os.environ | {
            "RANK": str(place.rank * processes + index),
            "WORLD_SIZE": str(place.ranks * processes),
            "LOCAL_RANK": str(place.local_rank * processes + index),
            "LOCAL_WORLD_SIZE": str(place.local_ranks * processes),
            "BANKO_JOB": place.job,
        }
        # Of an option given twice, the last counts.
        options = [*arguments, "--processes", "1", "--started-at", str(started)]
        # In a group of its own, a rank is not told of Ctrl-C twice.
        children.append(
            subprocess.Popen([sys.executable, "-m", "submission", *options], env=environment, process_group=0)
        )
        for earlier in told:
            children[-1].send_signal(earlier)
    codes = [child.wait() for child in children]
    failed = next((code for code in codes if code), 0)
    return 0 if 0 in codes else failed if failed > 0 else 128 - failed

"""`python -m submission`: notes the time before anything slow is imported, then runs the command line."""

import gc
import os
import time

PROCESS_START = time.time() - time.process_time()  # what the interpreter itself took is part of the budget

# Threads that wait for each other sleep instead of spinning. Read when torch is loaded. Beside another busy process on
# two cores the embedded model makes 130 images/s so, and 21 with the default; with the cores to itself, 313 and 353.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

# Libraries make objects by the million while they are imported, and none of them is garbage: looking for it took a
# fifth of the time. The job has it looked for again once its model is loaded.
gc.disable()

from submission.cli import main  # noqa: E402
from submission.streams import exit_at_once, open_streams  # noqa: E402

open_streams()
exit_at_once(main(process_start=PROCESS_START))

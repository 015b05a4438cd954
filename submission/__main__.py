"""``python -m submission``: notes the time before anything slow is imported, then runs the command line."""

import sys
import time

PROCESS_START = time.time() - time.process_time()  # what the interpreter itself took is part of the budget

from submission.cli import main  # noqa: E402

sys.exit(main(process_start=PROCESS_START))

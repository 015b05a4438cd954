"""The image, built and run without a container engine; see the script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("build_and_run.sh")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_image_makes_good_files_and_finishes_one_when_told_to_stop() -> None:
    process = subprocess.run(
        [SCRIPT], env=os.environ | {"BANKO_PYTHON": sys.executable}, stderr=subprocess.PIPE, text=True, check=False
    )
    if process.returncode == 2:
        pytest.skip(process.stderr.strip())
    assert process.returncode == 0, process.stderr

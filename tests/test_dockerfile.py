"""The Dockerfile, read by hadolint. `tests/container/` builds it."""

import subprocess
import sysconfig
from pathlib import Path

from tests.paths import ROOT


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    process = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")

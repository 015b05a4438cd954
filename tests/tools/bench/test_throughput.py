"""`bench throughput` from the command line, few images: what it prints and writes, not how fast it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


def test_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench", "throughput", "--turns", "1", "--batch-size", "2"]
    finished = subprocess.run(
        [*command, "--json", str(tmp_path / "figures.json")],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    rates = list(found["images_per_second"].values())
    assert found["speedup"] == found["speedup_least"] == found["speedup_most"] == rates[-1] / rates[0]
    assert 0 < found["unet_fraction_of_gemm_peak"] < 1.5
    assert found["unet_flops"] == pytest.approx(found["unet_images_per_second"] * found["unet_flop"])
    for name in found["images_per_second"]:
        assert name in finished.stdout

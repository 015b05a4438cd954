"""`bench evaluator` from the command line, on few and small images: what it prints and writes, not how fast it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tools.bench.__main__ import main


def test_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench", "evaluator", "--size", "16", "--steps", "1", "--turns", "2"]
    finished = subprocess.run(
        [*command, "--json", str(tmp_path / "figures.json")],
        cwd=ROOT,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},  # to compile takes longer than all the rest
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < found["speedup_least"] <= found["speedup"] <= found["speedup_most"]
    rates = found["images_per_second"]
    assert found["speedup_least"] <= rates["fast"] / rates["published"] <= found["speedup_most"]
    assert f"{found['speedup']:.2f}" in finished.stdout


@pytest.mark.parametrize("wrong", [["nothing"], ["evaluator", "--turns", "0"], []])
def test_wrong_usage(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(wrong)
    assert caught.value.code == 2

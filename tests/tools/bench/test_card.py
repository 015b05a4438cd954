"""`bench card` from the command line, on a few random weights: what it prints and writes, not how fast it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from submission.model import calibration
from tests.paths import ROOT
from tools.bench import __main__ as bench
from tools.bench import card


def test_from_the_command_line(
    checkpoint_folder: Path,
    task_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(card, "LARGEST_BATCH", 2)
    monkeypatch.setattr(calibration, "STEPS", 5)
    options = ["--model", str(checkpoint_folder), "--task", str(task_file), "--resolution", "16"]
    assert bench.main(["card", *options, "--json", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [row["resolution"] for row in found["resolutions"]] == [16]
    assert 0 < found["first_image_seconds"] < found["took_seconds"]
    for row in found["resolutions"]:
        best = row["unet_images_per_second"][str(row["batch_size"])]
        assert best == max(row["unet_images_per_second"].values())
        assert row["unet_fraction_of_gemm"] == pytest.approx(best * row["unet_flop"] / found["gemm_flops"])
        assert set(row["decoders"]) == {"vae", "linear", "distilled"}
        assert row["compiled_unet_images_per_second"] > 0 and row["compiled_vae_images_per_second"] > 0
        fastest = max(best, row["compiled_unet_images_per_second"])
        decoding = row["decoders"][row["ten_minutes"]["decoder"]]["images_per_second"]
        assert row["ten_minutes"]["images_per_second"] == pytest.approx(1 / (1 / fastest + 1 / decoding))
        assert set(row["ten_minutes"]["ipc"]) == {"cifar100", "tinyimagenet"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| cpu") and last.endswith(" |")


def test_a_job_that_fails_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench", "card", "--model", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert finished.returncode == 4 and finished.stderr.startswith("error: ")
    assert "Traceback" not in finished.stderr

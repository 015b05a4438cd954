"""`bench card` from the command line, on a few random weights: what it prints and writes, not how fast it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_from_the_command_line(checkpoint_folder: Path, task_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench", "card", "--model", str(checkpoint_folder), "--task", str(task_file)]
    command += ["--resolution", "32", "16", "--limit", "200s", "--json", str(tmp_path / "figures.json")]
    finished = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [row["resolution"] for row in found["resolutions"]] == [32, 16]
    assert found["first_image_seconds"] > 0 and found["took_seconds"] < 200
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
    last = finished.stdout.splitlines()[-1]
    assert last.startswith("| cpu") and last.endswith(" |")


def test_a_job_that_fails_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench", "card", "--model", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert finished.returncode == 4 and finished.stderr.startswith("error: ")
    assert "Traceback" not in finished.stderr

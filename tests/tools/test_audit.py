"""The check of a file without training: what is wrong is found, what is right is left alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from submission.dataset.dataset_file import mean_and_std
from submission.tasks import Task, load_task
from tests.paths import ROOT
from tools import audit
from tools.reading.tensor_files import LabelledImages
from tools.scoring.findings import inspect

CIFAR100 = load_task("cifar100")


def pixels(images: int = 200, seed: int = 0, size: int = 32) -> torch.Tensor:
    """Of 0..1 in 8 bits, all distinct."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, 3, size, size), generator=generator) / 255


def normalised(pixels: torch.Tensor, task: Task = CIFAR100) -> torch.Tensor:
    mean, std = mean_and_std(task)
    return (pixels - mean) / std


def inspected(images: torch.Tensor) -> dict[str, bool]:
    """Codes of what is found, and whether they are fatal."""
    labels = torch.arange(100).repeat_interleave(len(images) // 100)
    return {one.code: one.fatal for one in inspect(LabelledImages(images, labels), CIFAR100)}


@given(
    low=st.floats(0, 0.4),
    high=st.floats(0.6, 1),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "float16"]),
)
@settings(max_examples=20)
def test_good_images_are_left_alone(low: float, high: float, seed: int, dtype: str) -> None:
    assert inspected(normalised(low + (high - low) * pixels(seed=seed)).to(getattr(torch, dtype))) == {}


def with_flat_one() -> torch.Tensor:
    images = normalised(pixels())
    images[7] = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    return images


def imagenet_s() -> torch.Tensor:
    return (pixels() - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.1, 0.1, 0.1]).view(3, 1, 1)


WRONG: dict[str, tuple[Callable[[], torch.Tensor], dict[str, bool]]] = {
    "pixels of 0..1": (pixels, {"raw-0-1": True}),
    "pixels of 0..255": (lambda: pixels() * 255, {"raw-0-255": True}),
    "dark pixels of 0..255": (lambda: pixels() * 99, {"raw-0-255": True}),
    "a decoder's -1..1": (lambda: pixels() * 2 - 1, {"raw-minus-1-1": True}),
    "another deviation": (imagenet_s, {"out-of-range": False}),
    "a flat image": (with_flat_one, {"flat": True}),
    "a repeated image": (lambda: normalised(pixels())[[*range(199), 0]], {"repeated": False}),
    "one image a class, over and over": (
        lambda: normalised(pixels(100)).repeat_interleave(4, 0),
        {"repeated": True},
    ),
    "all black": (lambda: normalised(torch.zeros(100, 3, 32, 32)), {"flat": True, "repeated": True}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str) -> None:
    make, expected = WRONG[name]
    assert inspected(make()) == expected


def test_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "cifar100.pt"
    torch.save(normalised(pixels()), file)
    command = [sys.executable, "-m", "tools.audit", str(file), "--json", str(tmp_path / "found.json")]
    root = ROOT
    finished = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"{file}: 2 images per class for the 100 classes of cifar100, float32\ngood;")
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "file": str(file),
        "task": "cifar100",
        "ipc": 2,
        "dtype": "float32",
        "good": True,
        "findings": [],
    }
    # The sheet shows the first image of class 0 in its upper left corner, three times as large.
    with Image.open(tmp_path / "cifar100.audit.png") as sheet:
        corner = sheet.getpixel((5, 5))
    assert corner == tuple((pixels()[0, :, 0, 0] * 255).round().int().tolist())


def test_a_bad_file(task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.pt"
    torch.save(pixels(6, size=16), file)
    arguments = [str(file), "--task", str(task_file), "--json", str(tmp_path / "found.json")]
    assert audit.main([*arguments, "--sheet", str(tmp_path / "sheet.png")]) == 6
    assert "ERROR: the numbers, 0 to 1, look like pixels of 0..1; normalise them" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["good"] is False
    assert found["findings"][0]["code"] == "raw-0-1"
    assert (tmp_path / "sheet.png").exists()


def test_a_file_that_cannot_be_read(task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.pt"
    torch.save({"images": pixels(6, size=16)}, file)
    assert audit.main([str(file), "--task", str(task_file), "--json", str(tmp_path / "found.json")]) == 6
    assert capsys.readouterr().err.startswith(f"error: {file}: the file holds a dict")
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["code"] for one in found["findings"]] == ["refused"]

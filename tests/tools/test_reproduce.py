"""The published experiment: its training sets, its figure, and the table, with the embedded model."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from submission.tasks import load_task
from tools import reproduce
from tools.scoring.class_order import CIFAR100_BY_SUPERCLASS

TASK = load_task("cifar100")


def test_copies_stand_behind_their_images_and_below_them_in_the_figure(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 100, 3, 32, 32), dtype=np.uint8)
    reproduce.augment(images, TASK, tmp_path / "new")
    made = reproduce.read_images(tmp_path / "new/cifar100.pt", TASK)
    assert made.shape == (10, 100, 3, 32, 32) and np.array_equal(made[:2], images)
    with Image.open(io.BytesIO(reproduce.draw_figure(made, 2))) as drawn:
        figure = np.asarray(drawn.resize((10 * 32, 5 * 32), Image.Resampling.NEAREST))
    assert np.array_equal(figure[:32, 32:64], images[0, 1].transpose(1, 2, 0)), "the first image of the second class"
    assert np.array_equal(figure[32:64, :32], made[2, 0].transpose(1, 2, 0)), "its first copy"


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """The folder of a test set with an image of each class."""
    folder = tmp_path / "truth"
    folder.mkdir()
    content = {"images_val": torch.randn(100, 3, 32, 32), "labels_val": torch.arange(100)}
    torch.save(content, folder / "cifar100_test.pt")
    return folder


def test_the_table_has_the_published_order_beside_the_right_one(
    truth: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = ["--truth_dir", str(truth), "--output_dir", str(output), "--protocol", "official"]
    job = ["--model", "embedded", "--device", "cpu", "--budget", "90s", "--batch-size", "500"]
    assert reproduce.main(["--tasks", "cifar100", *options, "--max-steps", "1", "--runs", "1", *job]) == 0, (
        capfd.readouterr().err
    )
    rows = (output / "table.md").read_text().splitlines()[2:]
    assert [re.split(r" *\| *", row)[2:4] for row in rows] == [
        ["20", "the evaluator's"],
        ["20, and 4 copies of each", "the evaluator's"],
        ["20, and 4 copies of each", "the published one"],
    ]
    assert rows[2].endswith("| 0.0137 |") and all(re.search(r"\| 0\.\d{4} \| 0\.\d{4} \|", row) for row in rows)
    right, other = (
        reproduce.read_images(output / f"{name}/cifar100.pt", TASK)[:20]
        for name in ("augmented", "augmented-published-order")
    )
    names = [one.name for one in TASK.classes]
    for place, name in enumerate(CIFAR100_BY_SUPERCLASS):
        assert np.array_equal(other[:, place], right[:, names.index(name)])
    with Image.open(output / "cifar100.png") as figure:
        assert figure.size == (960, 480)


def test_what_cannot_be_reproduced_is_one_line(truth: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--tasks", "cifar10"]) == 2
    assert "nothing was published of cifar10: the tasks are cifar100 and tinyimagenet" in capfd.readouterr().err
    options = ["--output_dir", str(tmp_path / "out"), "--truth_dir", str(truth)]
    assert reproduce.main([*options, "--model", "/no/where"]) == 6
    said = capfd.readouterr().err
    assert "tinyimagenet_test.pt: no such file" in said and said.count("\n") == 1, "before anything is made"
    assert reproduce.main(["--tasks", "cifar100", *options, "--model", "/no/where"]) == 6
    assert "./run.sh cifar100 ended with exit code 4, as said above" in capfd.readouterr().err

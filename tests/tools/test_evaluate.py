"""The command line of the evaluator, from files to scores."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from submission import cli
from tests.paths import ROOT
from tools import evaluate
from tools.scoring.fast import Arithmetic

SHORT = ["--max-steps", "12", "--runs", "2"]


@pytest.fixture(autouse=True)
def _leave_the_allocator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would stay changed for every test that comes after.
    monkeypatch.setattr(evaluate, "keep_freed_memory", lambda: None)


@pytest.fixture
def folders(tmp_path: Path, task_file: Path) -> list[str]:
    """Arguments for an easy task: classes of noise about a prototype each, 4 images per class."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(3, 3, 16, 16, generator=generator)
    labels = torch.arange(3).repeat_interleave(4)
    noise = torch.randn(2, 12, 3, 16, 16, generator=generator)
    images, test_images = (0.5 * prototypes[labels] + 0.15 * noise).clamp(-1, 2)  # between black and white
    (tmp_path / "submit").mkdir()
    (tmp_path / "truth").mkdir()
    torch.save(images, tmp_path / "submit" / "tiny.pt")
    torch.save({"images_val": test_images, "labels_val": labels}, tmp_path / "truth" / "tiny_test.pt")
    return [
        *("--submit_dir", str(tmp_path / "submit"), "--truth_dir", str(tmp_path / "truth")),
        *("--output_dir", str(tmp_path / "out"), "--tasks", str(task_file), "--device", "cpu"),
    ]


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return content


def test_from_the_command_line(folders: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.evaluate", *folders, *SHORT]
    finished = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    found = results(tmp_path)
    assert found["protocol"] == "official"
    assert found["max_steps"] == 12
    tasks = found["tasks"]
    tiny = tasks["tiny"]
    assert tiny["ipc"] == 4
    assert tiny["steps"] == 12
    assert len(tiny["runs"]) == 2
    assert tiny["accuracy_mean"] == pytest.approx(sum(tiny["runs"]) / 2)
    assert tiny["accuracy_std"] == pytest.approx(abs(tiny["runs"][0] - tiny["runs"][1]) / 2)
    assert tiny["accuracy_mean"] > 0.6  # chance is a third
    assert found["score"] == tiny["accuracy_mean"]
    assert (tmp_path / "out" / "scores.txt").read_text() == f"correct: {found['score']}"
    # An estimate first, then an accuracy a run, then the table with chance beside it.
    lines = finished.stdout.splitlines()
    assert "4 images per class" in lines[0]
    assert "2 runs of 12 steps, about" in lines[0]
    assert sum("accuracy" in line for line in lines) == 2
    assert "0.3333" in lines[-6]
    assert "class order: ok" in lines[-2]
    assert lines[-1] == f"correct: {found['score']}"
    assert tiny["class_order"] == "ok"
    assert tiny["findings"] == []
    assert set(tiny["accuracy_by_class"]) == {"apple", "pear", "plum"}
    assert sum(tiny["accuracy_by_class"].values()) / 3 == pytest.approx(tiny["accuracy_mean"])
    for curve in tiny["learning_curves"]:
        assert curve["step"] == list(range(1, 13))
        assert curve["accuracy"][-1] > curve["accuracy"][0]
    with Image.open(tmp_path / "out" / "learning_curves.png") as picture:
        picture.verify()


def test_a_seed_gives_the_same_runs_again(folders: list[str], tmp_path: Path) -> None:
    runs = []
    for seed in ("1", "1", "2"):
        assert evaluate.main([*folders, "--max-steps", "2", "--runs", "3", "--seed", seed]) == 0
        runs.append(results(tmp_path)["tasks"])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_estimate_leaves_the_random_numbers_alone(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate.main([*folders, "--epochs", "1", "--runs", "1"])
    with_estimate = results(tmp_path)["tasks"]
    monkeypatch.setattr(evaluate, "announce", lambda *arguments: None)
    evaluate.main([*folders, "--epochs", "1", "--runs", "1"])
    assert results(tmp_path)["tasks"] == with_estimate


def test_the_report_on_the_run_gets_the_score(
    folders: list[str],
    checkpoint_folder: Path,
    task_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate.main([*folders, *SHORT]) == 0
    assert f"no report on tiny: {tmp_path}/submit/tiny.json: cannot be read" in capsys.readouterr().out
    job = [str(task_file), "--model", str(checkpoint_folder), "--output", str(tmp_path / "submit"), "--max-ipc", "4"]
    job += ["--select", "none"]
    assert cli.main(job) == 0
    before = (tmp_path / "submit/tiny.html").read_text()
    assert evaluate.main([*folders, *SHORT]) == 0
    page, tiny = (tmp_path / "out/tiny.html").read_text(), results(tmp_path)["tasks"]["tiny"]
    for text in (
        f"{tiny['accuracy_mean']:.4f}",
        tiny["class_order_audit"]["statement"],
        "Learning curves",
        "recognised",
    ):
        assert text in page and text not in before
    assert (tmp_path / "submit/tiny.html").read_text() == before
    (tmp_path / "submit/tiny.json").write_text('{"task": "tiny", "ipc": 4, "progress": {}}')
    capsys.readouterr()
    assert evaluate.main([*folders, *SHORT]) == 0
    said = capsys.readouterr().out
    assert "no report on tiny: " in said and "not the manifest of a run by this version" in said
    assert said.splitlines()[-1].startswith("correct: ")


def test_labels_are_told_by_position(folders: list[str], tmp_path: Path) -> None:
    file = tmp_path / "submit" / "tiny.pt"
    torch.save(torch.roll(torch.load(file), 4, 0), file)
    assert evaluate.main([*folders, "--max-steps", "12", "--runs", "1"]) == 0
    score = results(tmp_path)["score"]
    assert score < 0.2


def test_a_wrong_class_order_is_said(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Enough test images for a doubt to be ruled out.
    truth = tmp_path / "truth" / "tiny_test.pt"
    content = torch.load(truth)
    torch.save({name: tensor.repeat_interleave(5, 0) for name, tensor in content.items()}, truth)
    file = tmp_path / "submit" / "tiny.pt"
    torch.save(torch.roll(torch.load(file), 4, 0), file)
    assert evaluate.main([*folders, "--max-steps", "12", "--runs", "2"]) == 0
    tasks = results(tmp_path)["tasks"]
    assert tasks["tiny"]["class_order"] == "suspect"
    assert tasks["tiny"]["class_order_audit"]["likely_order"] == ["plum", "apple", "pear"]
    assert "plum where apple should be" in capsys.readouterr().out


def test_pixels_left_unnormalised_are_scored_with_a_warning(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.rand(12, 3, 16, 16) * 255, tmp_path / "submit" / "tiny.pt")
    assert evaluate.main([*folders, "--max-steps", "1", "--runs", "1"]) == 0
    assert "look like pixels of 0..255" in capsys.readouterr().err
    tasks = results(tmp_path)["tasks"]
    assert [one["code"] for one in tasks["tiny"]["findings"]] == ["raw-0-255"]


def test_fast_protocol_is_the_same_recipe(folders: list[str], tmp_path: Path) -> None:
    found = {}
    for protocol in ("official", "fast"):
        assert evaluate.main([*folders, *SHORT, "--protocol", protocol]) == 0
        found[protocol] = results(tmp_path)
        assert found[protocol]["protocol"] == protocol
    # One seed, so one draw of weights, batches and augmentations: the first losses differ by rounding alone.
    first, second = (found[protocol]["tasks"]["tiny"]["learning_curves"][0]["loss"][0] for protocol in found)
    assert first == pytest.approx(second, rel=0.02)
    assert found["fast"]["tasks"]["tiny"]["accuracy_mean"] > 0.6


def test_fast_without_a_compiler_is_a_warning(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "probe", lambda net, batch_size: Arithmetic(compiled=False, bf16=False))
    assert evaluate.main([*folders, *SHORT, "--protocol", "fast"]) == 0
    assert "nothing to compile with" in capsys.readouterr().err
    assert results(tmp_path)["arithmetic"] == {"compiled": False, "bf16": False}


def test_epochs_are_counted_from_0(folders: list[str], tmp_path: Path) -> None:
    assert evaluate.main([*folders, "--epochs", "2", "--runs", "1"]) == 0
    tasks = results(tmp_path)["tasks"]
    assert tasks["tiny"]["steps"] == 3


def test_one_task_present_is_evaluated_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.randn(100, 3, 32, 32), tmp_path / "cifar100.pt")
    torch.save(
        {"images_val": torch.randn(50, 3, 32, 32), "labels_val": torch.arange(50)}, tmp_path / "cifar100_test.pt"
    )
    folders = [f"--{name}_dir={tmp_path}" for name in ("submit", "truth", "output")]
    assert evaluate.main([*folders, "--max-steps=1", "--runs=1", "--device=cpu"]) == 0
    assert "holds no tinyimagenet.pt: evaluating cifar100 alone" in capsys.readouterr().out
    tasks = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert list(tasks) == ["cifar100"]


def test_score_is_the_mean_of_the_tasks(folders: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text((tmp_path / "tiny.toml").read_text().replace('"tiny"', '"other"'))
    for folder, suffix in (("submit", ""), ("truth", "_test")):
        (tmp_path / folder / f"other{suffix}.pt").symlink_to(tmp_path / folder / f"tiny{suffix}.pt")
    arguments = folders[:6] + folders[8:] + ["--tasks", str(tmp_path / "tiny.toml"), str(other)]
    assert evaluate.main([*arguments, "--max-steps", "2", "--runs", "2"]) == 0
    found = results(tmp_path)
    tasks = found["tasks"]
    assert found["score"] == pytest.approx((tasks["tiny"]["accuracy_mean"] + tasks["other"]["accuracy_mean"]) / 2)
    assert (tmp_path / "out" / "scores.txt").read_text() == f"correct: {found['score']}"


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = evaluate.main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return code, error


def test_bad_submission_is_refused_before_training(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save([1, 2, 3], tmp_path / "submit" / "tiny.pt")
    code, error = refusal(folders, capsys)
    assert code == 6
    assert "tiny.pt" in error
    assert not (tmp_path / "out").exists()


def test_images_too_large_to_train_on_are_refused_beforehand(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "memory_free", lambda: 1 << 20)
    code, error = refusal(folders, capsys)
    assert code == 6 and "tiny: training on batches of 12 images of 16 px takes about" in error


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (59.5, "60 s"), (60, "1 min"), (3599, "1 h 00 min"), (9600, "2 h 40 min")]
)
def test_duration(seconds: float, said: str) -> None:
    assert evaluate.duration(seconds) == said

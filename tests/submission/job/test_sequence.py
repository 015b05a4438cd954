"""Several tasks in one run: each has its file, whatever becomes of the others. Real processes, embedded checkpoint."""

import json
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from submission.tasks import load_task
from tests import forked
from tests.conftest import TINY_TASK
from tests.forked import end, kill, said
from tools.scoring.findings import audit

# Not to be reached by the first task.
NO_CAP = ("--max-ipc", "100000", "--batch-size", "100")
# The first task is soon done; the second takes seconds for every round.
FEW = ("--max-ipc", "4", "--batch-size", "3", "--aug-per-image", "0")
GRACE = 8.0


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    forked.warm_up()


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[str, str]:
    """CIFAR-100, and three classes at 16 px."""
    (tmp_path / "tiny.toml").write_text(TINY_TASK)
    return "cifar100", str(tmp_path / "tiny.toml")


def check(output: Path, task: str) -> dict[str, Any]:
    """The manifest of a complete file, which agrees with it and passes the audit."""
    found, file = load_task(task), output / f"{Path(task).stem}.pt"
    manifest: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
    assert [finding.text for finding in audit(file, found) if finding.fatal] == []
    assert len(torch.load(file, weights_only=True)) == len(found.classes) * manifest["ipc"]
    return manifest


def contents(output: Path, name: str) -> dict[str, tuple[int, bytes]]:
    """All of a task's files: when each was written, and what is in it."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.glob(f"{name}.*")}


def start_second(output: Path, tasks: tuple[str, str], *options: str) -> ForkServerProcess:
    """A run whose second task has a file in place, and more to make."""
    process = forked.start(output, *FEW, *options, tasks=tasks, device=forked.unhurried_with_the_second)
    forked.wait_for((output / "tiny.json").exists, process)
    assert process.is_alive(), said(output)
    return process


def test_both_tasks_leave_what_each_alone_leaves(tmp_path: Path, tasks: tuple[str, str]) -> None:
    output, options = tmp_path / "out", ("--max-ipc", "3", "--batch-size", "100")
    assert end(forked.start(output, *options, tasks=tasks)) == 0, said(output)
    names = [f"{name}.{kind}" for name in ("cifar100", "tiny") for kind in ("html", "json", "png", "pt")]
    assert sorted(path.name for path in output.iterdir()) == names
    for task, name in zip(tasks, ("cifar100", "tiny"), strict=True):
        assert check(output, task)["tasks"] == ["cifar100", "tiny"]
        assert end(forked.start(tmp_path / "alone", *options, tasks=[task])) == 0
        alone, both = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in (tmp_path / "alone", output))
        assert torch.equal(alone, both)
    first, second = said(output).splitlines()[-2:]
    assert f"cifar100: {output}/cifar100.pt, IPC 3, " in first and first.endswith("s before its deadline")
    assert f"tiny: {output}/tiny.pt, IPC 3, " in second
    assert "cifar100: " not in said(tmp_path / "alone"), "one task has said it all"


def test_ten_images_per_class_are_what_the_public_script_asserts(tmp_path: Path) -> None:
    """The challenge's evaluate.py takes exactly these shapes, by torch.load's defaults, and labels them by position."""
    output, options = tmp_path / "out", ("--max-ipc", "10", "--batch-size", "500")
    assert end(forked.start(output, *options, tasks=("cifar100", "tinyimagenet"))) == 0, said(output)
    for name, classes, size in (("cifar100", 100, 32), ("tinyimagenet", 200, 64)):
        images = torch.load(output / f"{name}.pt")
        assert images.shape == (10 * classes, 3, size, size) and images.dtype == torch.float32
        assert images.is_contiguous() and not images.requires_grad and check(output, name)["rounds"] == 10


def test_one_limit_for_all_is_kept_and_used(tmp_path: Path, tasks: tuple[str, str]) -> None:
    """The first task is done at once: its time is the second one's."""
    output, began = tmp_path / "out", time.time()
    options = ("--max-ipc", "2", "--batch-size", "100", "--total", "60s", "--started-at", str(began))
    assert end(forked.start(output, *options, tasks=tasks)) == 0, said(output)
    first, second = (check(output, task)["budget_seconds"] for task in tasks)
    assert first == pytest.approx(60 - 15), "the other one has few classes, and is to be made all the same"
    assert 60 - (time.time() - began) < second < 60


def test_one_limit_for_all_ends_all(tmp_path: Path) -> None:
    """Both tasks have as many classes, and would go on for ever."""
    twins = []
    for name in ("cifar100", "tiny"):
        twins.append(str(tmp_path / f"{name}.toml"))
        Path(twins[-1]).write_text(TINY_TASK.replace("= 12", "= 100000").replace('"tiny"', f'"{name}"'))
    output, began = tmp_path / "out", time.time()
    options = (*NO_CAP, "--aug-per-image", "0", "--total", "16s", "--started-at", str(began))
    process = forked.start(output, *options, tasks=twins, device=forked.slow_with_all)
    assert end(process) == 0 and time.time() - began < 16, said(output)
    assert all(check(output, task)["rounds"] > 1 for task in twins)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_in_the_first_task_none_is_begun(
    tmp_path: Path, tasks: tuple[str, str], number: signal.Signals
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "tiny.pt").write_text("of an earlier run")
    process = forked.start(output, *NO_CAP, tasks=tasks)
    forked.wait_for((output / "cifar100.json").exists, process)
    kill(process, number)
    assert end(process, GRACE) == 3, "one of the files that were asked for is not there"
    assert any(f"({number.name})" in warning for warning in check(output, "cifar100")["warnings"])
    assert "tiny: not begun, because the run was over before its turn" in said(output).splitlines()[-1]
    assert (output / "tiny.pt").read_text() == "of an earlier run"
    assert {path.name for path in output.glob("*tiny*")} == {"tiny.pt"}


def test_told_to_stop_in_the_second_task_both_are_complete(tmp_path: Path, tasks: tuple[str, str]) -> None:
    output = tmp_path / "out"
    process = start_second(output, tasks)
    before = contents(output, "cifar100")
    kill(process, signal.SIGTERM)
    assert end(process, GRACE) == 0, said(output)
    assert contents(output, "cifar100") == before
    manifest = check(output, tasks[1])
    assert 1 <= manifest["rounds"] < 4
    assert any("told to stop (SIGTERM)" in warning for warning in manifest["warnings"])


@pytest.mark.parametrize("moment", [forked.told_between_tasks, forked.told_as_the_second_begins])
def test_told_to_stop_between_two_tasks_the_second_is_not_begun(
    tmp_path: Path, tasks: tuple[str, str], moment: Callable[[], None]
) -> None:
    output = tmp_path / "out"
    process = forked.start(output, "--max-ipc", "2", "--batch-size", "100", tasks=tasks, fault=moment)
    assert end(process) == 3, said(output)
    check(output, "cifar100")
    assert not list(output.glob("*tiny*"))


def test_killed_in_the_second_task_the_first_stays_and_the_second_is_resumed(
    tmp_path: Path, tasks: tuple[str, str]
) -> None:
    output = tmp_path / "out"
    process = start_second(output, tasks)
    before = contents(output, "cifar100")
    kill(process, signal.SIGKILL)
    assert end(process) == -signal.SIGKILL
    assert check(output, tasks[1])["rounds"] >= 1
    options = (*FEW, "--resume", "--total", "60s")
    assert end(forked.start(output, *options, tasks=tasks)) == 0, said(output)
    assert contents(output, "cifar100") == before, "the whole file is left as it is"
    manifest = check(output, tasks[1])
    assert manifest["resumed_rounds"] >= 1 and manifest["rounds"] == 4
    assert manifest["budget_seconds"] == 60, "none of the time is for what is there"
    first, second = said(output).splitlines()[-2:]
    assert "IPC 4, complete before this run" in first and "tiny.pt, IPC 4, " in second


def test_resumed_one_task_alone_that_is_complete_is_left_as_it_is(tmp_path: Path) -> None:
    output, options = tmp_path / "out", ("--max-ipc", "4", "--budget", "60s")
    assert end(forked.start(output, *options)) == 0
    before = contents(output, "cifar100")
    for _ in range(2):
        assert end(forked.start(output, *options, "--resume")) == 0
        assert contents(output, "cifar100") == before
    assert said(output).count("complete before this run and left as it is: without --resume it is made anew") == 2
    assert end(forked.start(output, "--max-ipc", "3", "--budget", "60s", "--resume")) == 0
    assert check(output, "cifar100")["ipc"] == 3


def test_a_file_that_was_asked_for_otherwise_is_made_anew(tmp_path: Path, tasks: tuple[str, str]) -> None:
    output, options = tmp_path / "out", ("--max-ipc", "2", "--batch-size", "100")
    assert end(forked.start(output, *options, tasks=tasks)) == 0
    assert end(forked.start(output, *options, "--resume", "--seed", "1", tasks=tasks)) == 0
    assert [check(output, task)["seed"] for task in tasks] == [1, 1]
    assert end(forked.start(output, *options, "--resume", "--seed", "1", tasks=tasks)) == 0
    assert said(output).count("complete before this run") == 2


def test_what_the_words_and_the_model_say_counts_too(tmp_path: Path, checkpoint_folder: Path) -> None:
    """Not only the names of their files."""
    task, prompts, recipe = (tmp_path / f"{name}.toml" for name in ("tiny", "words", "recipe"))
    task.write_text(TINY_TASK)
    twin = tmp_path / "twin.toml"
    twin.write_text(TINY_TASK.replace('"tiny"', '"twin"'))
    words = 'apple = ["a"]\npear = ["b"]\nplum = ["{}"]\n'
    model = f'base = "{checkpoint_folder}"\n[sampling]\nscheduler = "TCDScheduler"\nsteps = 2\neta = {{}}\n'
    options = ("--max-ipc", "1", "--prompts", str(prompts), "--model", str(recipe), "--resume")
    left = []
    for word, eta in (("c", 1.0), ("c", 1.0), ("d", 1.0), ("d", 0.5)):
        prompts.write_text(words.format(word))
        recipe.write_text(model.format(eta))
        assert end(forked.start(tmp_path / "out", *options, tasks=[str(task), str(twin)])) == 0, said(tmp_path / "out")
        left.append(said(tmp_path / "out").count("complete before this run"))
    task.write_text(TINY_TASK.replace("mean = [0.5,", "mean = [0.6,"))
    assert end(forked.start(tmp_path / "out", *options, tasks=[str(task), str(twin)])) == 0, said(tmp_path / "out")
    left.append(said(tmp_path / "out").count("complete before this run"))
    assert left == [0, 2, 2, 2, 3], "in all"
    manifest = check(tmp_path / "out", str(twin))
    assert manifest["prompts_file"] == str(prompts) and manifest["sampling"]["eta"] == 0.5


def test_a_task_that_fails_keeps_no_other_from_being_made(tmp_path: Path, tasks: tuple[str, str]) -> None:
    output, options = tmp_path / "out", ("--max-ipc", "2", "--batch-size", "100")
    process = forked.start(output, *options, tasks=tasks, device=forked.no_model_for_the_first)
    assert end(process) == 4, said(output)
    assert not list(output.glob("*cifar100*")) and check(output, tasks[1])["ipc"] == 2
    assert said(output).count("error: /weights/unet is missing") == 1
    assert "cifar100: exit code 4: /weights/unet is missing" in said(output).splitlines()[-2]


def test_nor_does_one_that_ends_as_nobody_expects(tmp_path: Path, tasks: tuple[str, str]) -> None:
    output, options = tmp_path / "out", ("--max-ipc", "2", "--batch-size", "100")
    assert end(forked.start(output, *options, tasks=tasks, device=forked.broken_for_the_first)) == 1, said(output)
    assert check(output, tasks[1])["ipc"] == 2
    assert "cifar100: exit code 1: CUDA error: unspecified launch failure" in said(output).splitlines()[-2]


def test_a_task_without_time_for_a_round_ends_and_the_next_has_its_own(tmp_path: Path, tasks: tuple[str, str]) -> None:
    output, options = tmp_path / "out", ("--batch-size", "100", "--budget", "6s")
    process = forked.start(output, *options, tasks=tasks, device=forked.slow_to_load_the_first)
    assert end(process) == 3, said(output)
    assert not list(output.glob("*cifar100*")) and check(output, tasks[1])["budget_seconds"] == 6
    assert said(output).count("error: a budget of 6 s cannot hold one round") == 1


def test_a_device_that_answers_late_costs_the_next_task_nothing(tmp_path: Path, tasks: tuple[str, str]) -> None:
    output, options = tmp_path / "out", ("--batch-size", "100", "--budget", "8s")
    process = forked.start(output, *options, tasks=tasks, device=forked.late_with_the_first)
    assert end(process) == 0, said(output)
    manifest = check(output, "cifar100")
    assert manifest["elapsed_seconds"] < 8 and any("does not come back" in one for one in manifest["warnings"])
    assert check(output, tasks[1])["budget_seconds"] == 8


def test_a_device_that_does_not_answer_ends_the_run_with_what_is_complete(
    tmp_path: Path, tasks: tuple[str, str]
) -> None:
    output, began = tmp_path / "out", time.time()
    options = ("--batch-size", "100", "--budget", "6s", "--started-at", str(began))
    process = forked.start(output, *options, tasks=tasks, device=forked.stuck_device)
    assert end(process) == 3 and time.time() - began < 12, "gone when all time is over"
    assert check(output, "cifar100")["elapsed_seconds"] < 6
    first, second = said(output).splitlines()[-2:]
    assert "cifar100: ended with exit code 0" in first and "tiny: not begun" in second


def test_a_stop_is_heard_where_a_device_does_not_answer_any_more(tmp_path: Path, tasks: tuple[str, str]) -> None:
    output = tmp_path / "out"
    process = forked.start(output, "--batch-size", "100", "--budget", "6s", tasks=tasks, device=forked.stuck_device)
    forked.wait_for((output / "cifar100.json").exists, process)
    forked.wait_for(lambda: not (output / ".cifar100.spool").exists(), process)  # the guard has finished the file
    time.sleep(0.5)
    kill(process, signal.SIGTERM)
    assert end(process, 4) == 3, "the second task's file is not there"
    check(output, "cifar100")

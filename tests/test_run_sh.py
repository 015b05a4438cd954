"""run.sh with stand-ins for pip and Python that write down how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("run.sh", "requirements.txt", "requirements-dev.txt", "requirements-ray.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("pip", "python"):
        stub = tmp_path / ".venv/bin" / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f'#!/bin/bash\necho {name} "$@" >> "{tmp_path}/calls"\nexit ${{STUB_EXIT:-0}}\n')
        stub.chmod(0o755)
    return tmp_path


def run(project: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """The exit code, and the calls this start made, with the temporary folder's name left out."""
    calls = project / "calls"
    calls.unlink(missing_ok=True)
    # From another folder, as an absolute path, since that is how harnesses call it.
    process = subprocess.run(
        [project / "run.sh", *arguments], cwd="/", env={"PATH": os.environ["PATH"], **environment}, check=False
    )
    lines = calls.read_text().replace(f"{project}/", "").splitlines() if calls.exists() else []
    return process.returncode, lines


def test_the_first_start_installs_and_the_second_does_not(project: Path) -> None:
    install = [
        "pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt",
        "python -m compileall -q -j 0 .venv/lib",
    ]
    job = "python -m submission cifar100 --budget 90s"
    assert run(project, "cifar100", "--budget", "90s") == (0, [*install, job])
    assert run(project, "cifar100", "--budget", "90s") == (0, [job])
    with (project / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert run(project, "cifar100", "--budget", "90s") == (0, [*install, job])


def test_a_failed_installation_is_tried_again(project: Path) -> None:
    code, calls = run(project, "cifar100", STUB_EXIT="1")
    assert code == 1 and len(calls) == 1, "the job is not started"
    assert run(project, "cifar100")[1][0] == calls[0]


def test_tools_install_what_they_need_and_get_their_arguments(project: Path) -> None:
    code, calls = run(project, "evaluate", "--submit_dir", "a b")
    assert code == 0 and [call.split()[-1] for call in calls[:4:2]] == ["requirements.txt", "requirements-dev.txt"]
    assert calls[4:] == ["python -m tools.evaluate --submit_dir a b"]
    assert run(project, "init", "my.toml", "--classes", "x")[1] == ["python -m tools.init my.toml --classes x"]
    assert run(project, "audit", "x.pt")[1] == ["python -m tools.audit x.pt"]
    assert run(project, "report", "x.json")[1] == ["python -m tools.report x.json"]
    assert run(project, "rehearse", "cifar100", "--limit", "9")[1] == ["python -m tools.rehearse cifar100 --limit 9"]
    assert run(project, "bench", "evaluator")[1] == ["python -m tools.bench evaluator"]
    assert run(project, "make-checkpoint", "d")[1] == ["python -m tools.make_checkpoint d"]
    assert run(project, "fetch-weights", "d")[1] == ["python -m tools.fetch_weights d"]
    assert run(project, "train-embedded", "--data", "x")[1] == ["python -m tools.train_embedded --data x"]


@pytest.mark.parametrize(
    ("options", "several"),
    [
        ("--devices 8", True),
        ("--devices=2", True),
        ("--seed 3 --devices cpu:2", True),
        ("--cluster auto", True),
        ("--cluster=10.0.0.1:6379", True),
        ("--devices 1", False),
        ("--devices=cpu:1", False),
        ("--device cpu", False),
        ("--device cpu --devices 2", True),
    ],
)
def test_ray_comes_to_those_who_ask_for_several_devices(project: Path, options: str, several: bool) -> None:
    calls = run(project, "cifar100", *options.split())[1]
    installed = [call.split()[-1] for call in calls if call.startswith("pip")]
    assert installed == ["requirements.txt", *(["requirements-ray.txt"] if several else [])]
    assert run(project, "cifar100", *options.split())[1] == [f"python -m submission cifar100 {options}"]


def test_tests_are_linted_and_type_checked(project: Path) -> None:
    run(project, "test")  # installs
    _, calls = run(project, "test", "-x")
    tools = [call.removeprefix("python -m ") for call in calls]
    assert tools == ["ruff check .", "ruff format --check .", "mypy", "pytest -x"]


def test_in_the_image_nothing_is_installed(project: Path) -> None:
    interpreter = str(project / ".venv/bin/python")
    assert run(project, "cifar100", BANKO_PYTHON=interpreter) == (0, ["python -m submission cifar100"])


def test_an_interpreter_that_is_not_there_is_said(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(project, "cifar100", BANKO_PYTHON="/no/python") == (2, [])
    assert capfd.readouterr().err.startswith("error: BANKO_PYTHON=/no/python is no Python interpreter")


def test_the_exit_code_is_the_job_s(project: Path) -> None:
    run(project, "cifar100")
    assert run(project, "cifar100", STUB_EXIT="3")[0] == 3

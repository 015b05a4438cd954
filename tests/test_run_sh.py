"""run.sh with stand-ins for pip and Python that write down how they were called."""

import os
import shutil
import subprocess
import sys
import zipfile
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


def installing(requirements: str) -> list[str]:
    return [
        f"python -m pip install --quiet --disable-pip-version-check --no-compile -r {requirements}",
        "python -m compileall -q -j 0 .venv/lib",
    ]


def test_the_first_start_installs_and_the_second_does_not(project: Path) -> None:
    job, requirements = "python -m submission cifar100 --budget 90s", project / "requirements.txt"
    first = requirements.read_text()
    for text in (first, f"{first}# changed\n", first):
        requirements.write_text(text)
        assert run(project, "cifar100", "--budget", "90s") == (0, [*installing("requirements.txt"), job])
        assert run(project, "cifar100", "--budget", "90s") == (0, [job])


def test_a_failed_installation_is_tried_again(project: Path) -> None:
    code, calls = run(project, "cifar100", STUB_EXIT="1")
    assert code == 1 and len(calls) == 1, "the job is not started"
    assert run(project, "cifar100")[1][0] == calls[0]


def test_what_is_about_to_be_installed_is_said_with_its_size(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(project, "cifar100")
    said = capfd.readouterr().err
    assert "6 GB on disk, most of it PyTorch for NVIDIA GPUs" in said and "PIP_EXTRA_INDEX_URL=INDEX" in said


def test_tools_install_what_they_need_and_get_their_arguments(project: Path) -> None:
    code, calls = run(project, "evaluate", "--submit_dir", "a b")
    assert code == 0 and [call.split()[-1] for call in calls[:4:2]] == ["requirements.txt", "requirements-dev.txt"]
    assert calls[4:] == ["python -m tools evaluate --submit_dir a b"]
    assert run(project, "init", "my.toml", "--classes", "x")[1] == ["python -m tools init my.toml --classes x"]
    assert run(project, "audit", "x.pt")[1] == ["python -m tools audit x.pt"]
    assert run(project, "report", "x.json")[1] == ["python -m tools report x.json"]
    assert run(project, "rehearse", "cifar100", "--limit", "9")[1] == ["python -m tools rehearse cifar100 --limit 9"]
    assert run(project, "bench", "evaluator")[1] == ["python -m tools bench evaluator"]
    assert run(project, "make-checkpoint", "d")[1] == ["python -m tools make_checkpoint d"]
    assert run(project, "fetch-weights", "d")[1] == ["python -m tools fetch_weights d"]
    assert run(project, "train", "t", "--data", "x")[1] == ["python -m tools train t --data x"]


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
    installed = [call.split()[-1] for call in calls if call.startswith("python -m pip")]
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


# What follows has a real Python, real environments and a real pip, and requirements of which there are none.
MODULE = "import os, sys\nprint(sys.argv[1:], os.getcwd(), file=open(os.environ['SAID'], 'a'))\n"


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A project in a folder with a name that nobody would choose, whose job writes down how it was called."""
    folder = tmp_path / "a b'c\"d\n$e"
    (folder / "submission").mkdir(parents=True)
    (folder / "submission/__init__.py").touch()
    (folder / "submission/__main__.py").write_text(MODULE)
    shutil.copy(ROOT / "run.sh", folder)
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-ray.txt"):
        (folder / name).touch()
    return folder


def start(script: Path, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    said = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "SAID": str(cwd / "said")}
    command = [str(script), "cifar100", "a b"]
    return subprocess.Popen(command, cwd=cwd, env=said | environment, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    """What it said on standard error."""
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("suits", [True, False])
def test_a_python_that_packages_are_published_for_is_preferred(suits: bool, real: Path, tmp_path: Path) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    newer = f'[[ $1 == -c ]] && exec {sys.executable} -c "import sys; sys.version_info = (3, 14); $2"'
    others = "" if suits else "exit 1"
    for name, first in {"python3": newer, "python3.13": others, "python3.12": others, "python3.11": others}.items():
        script = commands / name
        said = f'[[ $1 != -m ]] || echo {name} >> "{tmp_path}/made"'
        script.write_text(f'#!/bin/bash\n{first}\n{said}\nexec {sys.executable} "$@"\n')
        script.chmod(0o755)
    ended(start(real / "run.sh", tmp_path, PATH=f"{commands}:/usr/bin:/bin"))
    assert (tmp_path / "made").read_text().split() == ["python3.13" if suits else "python3"]


def test_from_anywhere_through_a_link_in_any_environment(real: Path, tmp_path: Path) -> None:
    """The folder it is called from, and another Python's packages, hold modules of the names that ours imports."""
    cwd, broken = tmp_path / "cwd", tmp_path / "broken"
    for folder in (cwd / "tools", broken / "numpy", tmp_path / "bin"):
        folder.mkdir(parents=True)
    for module in (cwd / "submission.py", cwd / "random.py", cwd / "tools/__init__.py", broken / "numpy/__init__.py"):
        module.write_text("raise SystemExit('the wrong module')\n")
    (broken / "pip.py").write_text("raise SystemExit('the wrong pip')\n")
    link = tmp_path / "bin/banko"
    link.symlink_to(real / "run.sh")
    ended(start(link, cwd, PYTHONPATH=str(broken), PYTHONHOME="/no/where", PYTHONWARNINGS="error"))
    assert (cwd / "said").read_text() == f"['cifar100', 'a b'] {cwd}\n"
    assert (real / ".venv/bin/python").exists() and not (tmp_path / "bin/.venv").exists()


def test_settings_of_pip_that_would_install_elsewhere_do_not_hold(real: Path, tmp_path: Path) -> None:
    settings = ("USER", "REQUIRE_VIRTUALENV", "DRY_RUN", "NO_DEPS")
    told = {f"PIP_{name}": "1" for name in settings} | {"PIP_TARGET": str(tmp_path / "t"), "PIP_PREFIX": "/no"}
    ended(start(real / "run.sh", tmp_path, **told))
    assert not (tmp_path / "t").exists()


def test_several_first_starts_at_once_install_once(real: Path, tmp_path: Path) -> None:
    processes = [start(real / "run.sh", tmp_path) for _ in range(4)]
    said = "".join(ended(process) for process in processes)
    assert said.count("installing requirements.txt") == 1
    assert len((tmp_path / "said").read_text().splitlines()) == 4


@pytest.mark.parametrize("damage", ["dangling", "upgraded", "without pip", "half deleted", "no configuration"])
def test_an_environment_that_is_not_whole_is_made_anew(real: Path, tmp_path: Path, damage: str) -> None:
    ended(start(real / "run.sh", tmp_path))
    python = real / ".venv/bin/python"
    if damage == "without pip":
        (real / ".venv/bin/pip").unlink()
    elif damage == "half deleted":
        shutil.rmtree(next((real / ".venv/lib").glob("python3*/site-packages")))
    elif damage == "no configuration":
        (real / ".venv/pyvenv.cfg").unlink()
    else:
        python.unlink()
        other = tmp_path / "python3.99"  # of another version than the packages
        shutil.copy(Path(sys.executable).resolve(), other)
        python.symlink_to(other if damage == "upgraded" else "/no/python3")
    assert "installing" in ended(start(real / "run.sh", tmp_path))


def refused(project: Path, cwd: Path, **environment: str) -> str:
    """What a start says that does not come to the job."""
    process = start(project / "run.sh", cwd, **environment)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and not (cwd / "said").exists(), said
    return said


def test_an_environment_may_be_kept_elsewhere(real: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (real / ".venv").symlink_to(tmp_path / "scratch")
    ended(start(real / "run.sh", tmp_path))
    assert (tmp_path / "scratch/bin/python").exists() and (real / ".venv").is_symlink()


def test_nothing_but_an_environment_is_cleared_to_make_one(real: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").touch()
    venv = real / ".venv"
    for target in (tmp_path / "mine", tmp_path / "nowhere"):
        venv.symlink_to(target)
        assert "is no Python environment and no empty folder: remove the link" in refused(real, tmp_path)
        venv.unlink()
    assert (tmp_path / "mine/precious").exists()
    venv.touch()
    assert "is in the way of a Python environment: remove it" in refused(real, tmp_path)


def test_packages_that_pip_was_told_to_put_elsewhere_are_missed(real: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "a_b-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("a_b-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-b\nVersion: 1\n")
        file.writestr("a_b-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("a_b-1.dist-info/RECORD", "")
    (real / "requirements.txt").write_text("a-b==1\n")
    settings, found = tmp_path / "pip.conf", f"[install]\nno-index = true\nfind-links = {tmp_path}\n"
    for elsewhere in (f"target = {tmp_path}/target", "dry-run = true"):
        settings.write_text(f"{found}{elsewhere}\n")
        assert "pip has installed requirements.txt elsewhere" in refused(real, tmp_path, PIP_CONFIG_FILE=str(settings))
    settings.write_text(found)
    ended(start(real / "run.sh", tmp_path, PIP_CONFIG_FILE=str(settings)))


def test_a_copied_project_has_an_environment_of_its_own(real: Path, tmp_path: Path) -> None:
    ended(start(real / "run.sh", tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(real, copy, symlinks=True)
    (copy / "requirements.txt").write_text("# changed\n")
    before = sorted((path, path.stat().st_mtime_ns) for path in real.rglob("*"))
    ended(start(copy / "run.sh", tmp_path))
    assert sorted((path, path.stat().st_mtime_ns) for path in real.rglob("*")) == before


def test_line_ends_are_bash_s_on_every_system() -> None:
    asked = ["git", "check-attr", "eol", "run.sh", ".ci/run", "Dockerfile", "tests/container/build_and_run.sh"]
    told = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip("this is no checkout of git's")
    assert [line.split(": ")[-1] for line in told.stdout.splitlines()] == ["lf"] * 4

"""What control groups allow, of either version, as containers and clusters show them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from submission.machine import limits
from tests.paths import ROOT

V2 = "30 24 0:26 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = """31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 24 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"""
TOP = V2.format(top="/")


def make(root: Path, group: str, mounts: str, files: Mapping[str, str]) -> Path:
    """A machine whose process is in that group."""
    for name, text in {"proc/self/cgroup": group, "proc/self/mountinfo": mounts, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("group", "mounts", "files", "memory", "cores"),
    [
        ("0::/", TOP, {}, None, None),
        ("0::/", TOP, {"memory.max": "max", "cpu.max": "max 100000"}, None, None),
        ("0::/", TOP, {"memory.max": "2000", "memory.current": "500", "cpu.max": "150000 100000"}, 1500, 2),
        ("0::/a/b", TOP, {"a/b/memory.max": "900", "a/b/memory.current": "200"}, 700, None),
        ("0::/a/b", TOP, {"a/memory.max": "900", "a/b/memory.max": "max"}, 900, None),
        ("0::/a/b", TOP, {"a/memory.max": "900", "a/b/memory.max": "500", "a/cpu.max": "10000 100000"}, 500, 1),
        ("0::/docker/x", V2.format(top="/docker/x"), {"memory.max": "800"}, 800, None),
        ("0::/", TOP, {"memory.max": "9", "memory.current": "12"}, 0, None),
        (
            "0::/",
            TOP,
            {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 5\ninactive_file 300"},
            400,
            None,
        ),
        (
            "5:memory:/slurm/job\n3:cpu,cpuacct:/slurm",
            V1,
            {
                "memory/slurm/memory.limit_in_bytes": "700",
                "memory/slurm/job/memory.limit_in_bytes": "9223372036854771712",
                "cpu/slurm/cpu.cfs_quota_us": "100000",
                "cpu/slurm/cpu.cfs_period_us": "100000",
            },
            700,
            1,
        ),
        ("3:cpu,cpuacct:/", V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "9"}, None, None),
    ],
)
def test_the_least_of_a_group_and_its_parents_counts(
    group: str, mounts: str, files: Mapping[str, str], memory: int | None, cores: int | None, tmp_path: Path
) -> None:
    root = make(tmp_path, group, mounts, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert limits.memory_left(root) == memory
    assert limits.cores(root) == min(cores or 10**6, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("quota", ["100000", "100000 0", "abc def", "", "max 100000"])
def test_what_makes_no_sense_is_no_limit(quota: str, tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": quota, "sys/fs/cgroup/memory.max": quota}
    root = make(tmp_path, "nonsense\n0::/", f"short\n{V2}", files)
    assert limits.cores(root) == len(os.sched_getaffinity(0))
    assert limits.memory_left(root) in (None, 100000)


def test_a_machine_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert limits.memory_left(tmp_path) is None and limits.cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.fixture
def limited() -> Iterator[list[Path]]:
    """Real groups with half a core and half a gigabyte, to whose `tasks` a process can write itself."""
    groups = {"memory": {"memory.limit_in_bytes": str(1 << 29)}, "cpu": {"cpu.cfs_quota_us": "50000"}}
    made = []
    try:
        for controller, settings in groups.items():
            folder = Path("/sys/fs/cgroup", controller, f"banko-test-{os.getpid()}")
            folder.mkdir()
            made.append(folder)
            for name, value in settings.items():
                (folder / name).write_text(value)
    except OSError as error:
        for folder in made:
            folder.rmdir()
        pytest.skip(f"no groups of version 1 can be made here: {error}")
    yield made
    for folder in made:
        folder.rmdir()


def test_real_limits_of_a_real_process(limited: list[Path]) -> None:
    joins = "".join(f"open('{folder}/tasks', 'w').write(str(os.getpid()));" for folder in limited)
    code = f"import os; {joins} from submission.machine import limits; print(limits.cores(), limits.memory_left())"
    cores, left = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split())
    assert cores == 1 and 0 < left <= 1 << 29

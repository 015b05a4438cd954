"""What a container or a cluster allows this process: memory and cores, by control groups of version 1 or 2.

A limit holds for a group and all groups below it, so that the group of this process and its parents all count
(cgroups(7), and the kernel's admin-guide on cgroup-v1 and cgroup-v2).
"""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SLASH = Path("/")


def cores(root: Path = SLASH) -> int:
    """How many cores' worth of time this process gets: those it may run on, or a quota of fewer."""
    own = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = [quota for group in _groups("cpu", root) if (quota := _cores(group))]
    return min([own, *(max(1, math.ceil(quota)) for quota in quotas)])


def memory_left(root: Path = SLASH) -> int | None:
    """Bytes that the limits leave, what the page cache would give back included; None where there are none."""
    return min((left for group in _groups("memory", root) if (left := _left(group)) is not None), default=None)


def _cores(group: Path) -> float | None:
    # Of version 2, in one file, or of version 1, in two.
    if found := re.fullmatch(r"(\d+) (\d+)", (_text(group / "cpu.max") or "").strip()):
        quota, period = int(found[1]), int(found[2])
    else:
        quota, period = _number(group / "cpu.cfs_quota_us") or 0, _number(group / "cpu.cfs_period_us") or 0
    return quota / period if quota > 0 and period else None


def _left(group: Path) -> int | None:
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, taken = _number(group / limit), _number(group / usage)
        if most is not None:
            found = re.search(rf"^{cache} (\d+)$", _text(group / "memory.stat") or "", re.MULTILINE)
            return max(0, most - (taken or 0) + (int(found[1]) if found else 0))
    return None


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the groups that this process is in, for a controller, from its own up."""
    own: dict[str, str] = {}
    for found in re.finditer(r"^\d+:([^:]*):(.*)$", _text(root / "proc/self/cgroup") or "", re.MULTILINE):
        own |= dict.fromkeys(found[1].split(","), found[2])
    mounts = r"^\d+ \d+ \S+ (\S+) (\S+) .*? - (\S+) \S+ (\S+)$"
    for top, mounted, kind, options in re.findall(mounts, _text(root / "proc/self/mountinfo") or "", re.MULTILINE):
        if kind not in ("cgroup", "cgroup2"):
            continue
        name = controller if kind == "cgroup" else ""
        if name not in own or (name and name not in options.split(",")):
            continue
        # A container may see its own group at the mount's root, or the path that the host knows it by.
        inside = Path(own[name].removeprefix(top.rstrip("/")).lstrip("/"))
        for part in [inside, *inside.parents]:
            yield root / _unescaped(mounted).lstrip("/") / part


def _unescaped(path: str) -> str:
    """Blanks and the like stand as three octal digits in a table of mounts."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _text(file: Path) -> str | None:
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError):
        return None


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit: "max"."""
    text = (_text(file) or "").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None

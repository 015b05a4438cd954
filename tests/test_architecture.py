"""The house: who imports whom, as docs/architecture.md says; small objects that only their own methods write to."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

# Rooms of submission/, a folder or a file each, and the others that each may import.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "tasks": {"errors"},
    "plan": {"errors"},
    "machine": {"errors"},
    "streams": set(),
    "arguments": {"errors", "streams"},
    "launchers": {"errors"},
    "log": {"plan", "streams"},
    "dataset": {"errors", "tasks", "machine"},
    "distillation": {"tasks", "dataset"},
    "model": {"errors", "tasks", "plan", "machine", "log"},
    "engine": {"errors", "plan", "machine", "log", "model"},
    "request": {"tasks", "plan", "dataset", "model"},
    "report": {"errors", "tasks", "machine", "dataset", "model"},
    "job": {
        "errors",
        "tasks",
        "plan",
        "machine",
        "log",
        "dataset",
        "distillation",
        "model",
        "engine",
        "request",
        "report",
    },
    "cli": {"errors", "tasks", "plan", "arguments", "launchers", "log", "model", "engine", "request", "job"},
    "__main__": {"cli", "streams"},
}
COMMANDS = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
MOST_FIELDS = 10


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(ROOT / "submission").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources("submission"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_those_below_it_alone(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        assert not list(imports(path))
        return
    modules = {module.split(".")[1] for module in imports(path) if module.startswith("submission.")}
    assert modules - {own} <= ROOMS[own]
    assert not any(module.split(".")[0] in ("tools", "tests") for module in imports(path))


def test_no_import_runs_in_a_circle() -> None:
    """Of files, whatever rooms they are in."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources("submission")}
    files |= {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources("tools")}
    below = {name: {module for module in imports(path) if module in files} for name, path in files.items()}
    while ground := {name for name, others in below.items() if not others & below.keys()}:
        below = {name: others for name, others in below.items() if name not in ground}
    assert not below


@pytest.mark.parametrize("path", sources("tools"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_command_imports_another_nor_a_part_of_a_command_the_command(path: Path) -> None:
    modules = {module.split(".")[1] for module in imports(path) if module.startswith("tools.")}
    assert not modules & COMMANDS
    assert not any(module.split(".")[0] == "tests" for module in imports(path))


def test_the_table_in_the_docs_is_this_one() -> None:
    rows = re.findall(
        r"^\| `(\w+)(?:/|\.py)` \| [^|]* \| ([^|]*) \|$", (ROOT / "docs/architecture.md").read_text(), re.M
    )
    told = {name: words for name, words in rows if name in ROOMS}
    for name in ROOMS.keys() - {"job", "cli", "__main__"}:
        assert set(re.findall(r"\w+", told[name])) - {"nothing"} == ROOMS[name], name


def test_plans_know_nothing_of_torch() -> None:
    code = "import sys, submission.plan.planner, submission.plan.guard; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


def classes(path: Path) -> Iterator[ast.ClassDef]:
    yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))


def fields(one: ast.ClassDef) -> set[str]:
    """What its instances hold under a public name: a dataclass's fields, or what `__init__` sets."""
    stated = (node.target for node in one.body if isinstance(node, ast.AnnAssign))
    found = {target.id for target in stated if isinstance(target, ast.Name)}
    for function in one.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            attributes = (node for node in ast.walk(function) if isinstance(node, ast.Attribute))
            found |= {a.attr for a in attributes if isinstance(a.ctx, ast.Store) and _is_self(a.value)}
    return {name for name in found if not name.startswith("_")}


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def test_no_public_object_has_more_than_ten_fields() -> None:
    for path in [*sources("submission"), *sources("tools")]:
        for one in classes(path):
            assert one.name.startswith("_") or len(fields(one)) <= MOST_FIELDS, f"{path}: {one.name}"


def test_plans_are_told_and_not_written_to() -> None:
    """No file assigns to a field of what another file of `plan/` holds."""
    fields_of = {path: set().union(*map(fields, classes(path))) for path in sources("submission/plan")}
    for path in [*sources("submission"), *sources("tools")]:
        if path not in fields_of and not any(module.startswith("submission.plan") for module in imports(path)):
            continue
        others = set().union(*(names for of, names in fields_of.items() if of != path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in others:
                assert _is_self(node.value), f"{path}:{node.lineno}: {ast.unparse(node)}"

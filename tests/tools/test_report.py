"""The command line that makes a run's report anew."""

import json
from pathlib import Path

import pytest

from submission import cli
from tools import report


@pytest.fixture
def run(checkpoint_folder: Path, task_file: Path, tmp_path: Path) -> list[str]:
    """A run without its report, and the arguments that ask for it."""
    options = ["--model", str(checkpoint_folder), "--output", str(tmp_path), "--max-ipc", "2"]
    options += ["--select", "none"]
    assert cli.main([str(task_file), *options]) == 0
    (tmp_path / "tiny.html").rename(tmp_path / "before.html")
    return [str(tmp_path / "tiny.json"), "--task", str(task_file)]


def test_it_is_the_page_that_the_run_makes(run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(run) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "tiny.html")
    assert (tmp_path / "tiny.html").read_text() == (tmp_path / "before.html").read_text()
    assert report.main([*run, "--page", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()


def test_files_that_are_not_a_run_s_are_refused(
    run: list[str], task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: str) -> str:
        assert report.main([*run, *arguments]) == 6
        return capsys.readouterr().err

    manifest = tmp_path / "tiny.json"
    content = json.loads(manifest.read_text())
    results = tmp_path / "results.json"
    results.write_text('{"tasks": {"cifar100": {}}}')
    assert "no results of evaluate for tiny" in refusal("--results", str(results))
    for odd in ("5", "null", '{"tiny": 3}', '["tiny"]'):
        results.write_text(f'{{"tasks": {odd}}}')
        assert "no results of evaluate for tiny" in refusal("--results", str(results))
    manifest.write_text(json.dumps(content | {"ipc": 3}))
    assert "tells of 9 images for tiny, and these are 6 for tiny: it belongs to another file" in refusal()
    manifest.write_text('{"tasks": {}}')
    assert "not the manifest of a run" in refusal()
    for changes in ({"task": 5}, {"ipc": "2"}, {"ipc": None}):
        manifest.write_text(json.dumps(content | changes))
        assert "not the manifest of a run" in refusal()
    for lacking in ("warnings", "steps", "plans", "decoder"):
        manifest.write_text(json.dumps({name: value for name, value in content.items() if name != lacking}))
        assert f"not the manifest of a run by this version ('{lacking}" in refusal()
    for changes in ({"phases_from_to": 3}, {"rounds": "many"}, {"budget_seconds": None}):
        manifest.write_text(json.dumps(content | changes))
        assert "not the manifest of a run by this version" in refusal()
    manifest.write_text("[" * 200_000)
    assert "not JSON" in refusal()
    manifest.write_text("[1]")
    assert "a list" in refusal()
    manifest.write_text("{")
    assert "not JSON" in refusal()
    manifest.unlink()
    assert "cannot be read (No such file" in refusal()

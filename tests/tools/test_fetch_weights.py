"""SDXL-Turbo's files are fetched once, at the pinned revision, and nothing else passes for them."""

import shutil
from pathlib import Path

import pytest

from submission.model.checkpoint import SDXL_TURBO, SDXL_TURBO_REVISION, inspect, weight_digests
from tools import fetch_weights


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch, checkpoint_folder: Path) -> None:
    """The tests' own small checkpoint is what is published, and there is no network."""
    monkeypatch.setattr(fetch_weights, "SDXL_TURBO_SHA256", weight_digests(inspect(checkpoint_folder, "test")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def copy(checkpoint_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "copy"))


def test_files_that_are_there_are_checked_without_the_hub(copy: Path) -> None:
    assert fetch_weights.main([str(copy)]) == 0


def test_what_is_missing_is_fetched_at_the_pinned_revision(
    monkeypatch: pytest.MonkeyPatch, checkpoint_folder: Path, copy: Path
) -> None:
    def snapshot_download(name: str, *, revision: str, local_dir: Path, **_: object) -> str:
        assert (name, revision) == (SDXL_TURBO, SDXL_TURBO_REVISION)
        return str(shutil.copytree(checkpoint_folder, local_dir, dirs_exist_ok=True))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    shutil.rmtree(copy / "unet")
    assert fetch_weights.main([str(copy)]) == 0
    assert inspect(copy, "test")


def test_what_is_missing_without_a_hub_is_an_error(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "vae/config.json").unlink()
    assert fetch_weights.main([str(copy)]) == 4
    assert f"error: {copy / 'vae/config.json'} is missing" in capsys.readouterr().err
    assert fetch_weights.main([str(tmp_path / "new")]) == 4
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {SDXL_TURBO} is ")


def test_other_weights_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "vae/diffusion_pytorch_model.fp16.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fetch_weights.main([str(copy)]) == 4
    assert f"error: {file} is not SDXL-Turbo's" in capsys.readouterr().err

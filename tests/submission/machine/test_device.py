"""Which device, and what is said where a GPU is there and not seen."""

import shutil
from pathlib import Path

import pytest
import torch

from submission.machine.device import unseen_gpu


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with NVIDIA's driver, whose CUDA devices this process may see."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").touch()
    return tmp_path


def test_without_a_driver_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert unseen_gpu(tmp_path) is None


def test_a_container_without_the_device_is_told_of_its_option(driver: Path) -> None:
    said = unseen_gpu(driver)
    assert said and ("--gpus all" in said or "a build for CPUs" in said)


def test_a_device_that_torch_cannot_use_is_said_with_its_reason(driver: Path) -> None:
    (driver / "dev").mkdir()
    (driver / "dev/nvidia0").touch()
    said = unseen_gpu(driver)
    assert said and "--gpus" not in said and "\n" not in said


def test_a_command_of_the_driver_s_is_enough(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(driver / "proc")
    (driver / "bin").mkdir()
    (driver / "bin/nvidia-smi").write_text("#!/bin/sh\n")
    (driver / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", "/bin")
    assert unseen_gpu(driver)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_devices_that_the_user_has_hidden_are_not_missed(
    hidden: str, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert unseen_gpu(driver) is None

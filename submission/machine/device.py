"""Which of this machine's devices are meant: a GPU, the CPU, or several."""

import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

from submission.errors import UsageError, first_line


def choose_device(wanted: str) -> torch.device:
    """This process's own: `auto` is a GPU where there is one. Raises UsageError where one is asked for and there is
    none."""
    kind, _ = choose_devices(wanted, 1)
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


def choose_devices(wanted: str, count: int | None) -> tuple[str, int]:
    """What of `auto`, `cpu` and `cuda` it comes to, and how many: None stands for every GPU, or the CPU once. Raises
    UsageError where there are fewer."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or check the driver")
    if not available or wanted == "cpu":
        return "cpu", count or 1
    there = torch.cuda.device_count()
    if count is not None and count > there:
        raise UsageError(f"--devices {count}: PyTorch sees {there} CUDA devices here; cpu:{count} would use the CPU")
    return "cuda", count or there


def unseen_gpu(root: Path = Path("/")) -> str | None:
    """Why PyTorch sees no CUDA device although a driver for one is installed; None where neither is so, or where
    CUDA_VISIBLE_DEVICES hides them all."""
    driver = (root / "proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi", path=_path(root))
    if torch.cuda.is_available() or not driver or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if torch.version.cuda is None:
        return "this PyTorch is a build for CPUs"
    if not list((root / "dev").glob("nvidia[0-9]*")):
        return "there is no /dev/nvidia0: a container needs --gpus all, a cluster's job a GPU that it asks for"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return first_line(error)
    return "its driver answers, and offers none"


def _path(root: Path) -> str:
    return os.pathsep.join(str(root / part.lstrip("/")) for part in os.environ.get("PATH", "").split(os.pathsep))


def wake(device: torch.device, dtype: torch.dtype) -> None:
    """Loads a GPU's libraries on a thread; otherwise the first use of each operation would wait for them."""

    def compute() -> None:
        with suppress(RuntimeError):  # what is wrong is said where the results matter
            rows = torch.zeros(1, 64, 64, device=device, dtype=dtype)
            rows @ rows
            F.scaled_dot_product_attention(rows[None], rows[None], rows[None])
            F.conv2d(rows[None], torch.zeros(64, 1, 3, 3, device=device, dtype=dtype))
            torch.cuda.synchronize(device)

    if device.type == "cuda":
        threading.Thread(target=compute, daemon=True).start()

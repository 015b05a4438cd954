"""What the organisers' evaluator computes, recorded; and the figures a recorded tensor is boiled down to."""

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.paths import GOLDEN


def recorded() -> Any:
    """The content of evaluator.json."""
    return json.loads((GOLDEN / "evaluator.json").read_text())


def recorded_operations() -> dict[str, NDArray[np.float32]]:
    """The content of dsa.npz."""
    with np.load(GOLDEN / "dsa.npz") as content:
        return dict(content)


def figures(tensor: torch.Tensor) -> list[float]:
    """The sum, the sum of magnitudes, and the first four numbers."""
    numbers = tensor.detach().double().flatten()
    return [numbers.sum().item(), numbers.abs().sum().item(), *numbers[:4].tolist()]

"""Networks and a clock for the stages of a training."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from submission.log import Log
from submission.plan.budget import Budget
from tools.training import layout, progress
from tools.training.progress import Place, Progress


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> layout.Networks:
    monkeypatch.setattr(layout, "UNET_WIDTHS", {"small": (32, 32)})
    torch.manual_seed(0)
    return layout.build_networks(["a photo of an apple"], "small", 32)


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Progress]:
    """A stage that has the time for so many steps: every look at the clock takes a second."""
    monkeypatch.setattr(progress, "save", lambda _: None)

    def make(stage: str, steps: int) -> Progress:
        budget = Budget(10_000.0, 0.0, clock=itertools.count().__next__)
        place = Place(stage, until=10_000.0, ends=steps, falls=steps // 2)
        return Progress(tmp_path, budget, Log("kept", budget), {}, torch.Generator(), {"seed": 0}, place)

    return make

"""The choice of a decoder: by what fidelity and pace make of the result, measured on the generator's own latents."""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from submission.errors import UsageError
from submission.log import Log
from submission.model import calibration
from submission.model.calibration import SAMPLES, choose_decoder, worth
from submission.model.decoder import Decoder
from submission.plan.budget import start_budget
from submission.tasks import load_task

CIFAR100 = load_task("cifar100")
CPU = torch.device("cpu")


@dataclass
class SlowGenerator:
    """Latents and a VAE that take as many seconds an image as they are told to; pixels are `shape` of the latents."""

    sampling: float = 0.0
    decoding: float = 0.0
    side: int = 32
    shape: Any = lambda pixels: pixels / 8
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.task, self.sampler = CIFAR100, SimpleNamespace(side=self.side, device=CPU)
        self.decoder = Decoder("vae", 32, self._canvas, {})

    def latents(self, numbers: NDArray[np.int64], _: Log) -> torch.Tensor:
        self.asked += numbers.tolist()
        time.sleep(self.sampling * len(numbers))
        generator = torch.Generator().manual_seed(int(numbers[0]))
        return torch.randn(len(numbers), 4, self.side, self.side, generator=generator)

    def _canvas(self, latents: torch.Tensor) -> torch.Tensor:
        time.sleep(self.decoding * len(latents))
        pixels: torch.Tensor = self.shape(F.adaptive_avg_pool2d(latents, 32)[:, :3])
        return pixels


@pytest.fixture(autouse=True)
def _short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "STEPS", 5)


@pytest.fixture
def log() -> Log:
    return Log("plain", start_budget(60))


def choose(generator: Any, log: Log, wanted: Any = "auto", left: float = 600.0, cap: int = 500) -> Decoder:
    return choose_decoder(generator, wanted, None, left=left, cap=cap, log=log)


def test_a_slow_vae_is_replaced(log: Log) -> None:
    generator = SlowGenerator(sampling=0.005, decoding=0.06)
    chosen = choose(generator, log, left=1500.0)  # so much that a stall of a busy machine decides nothing
    assert chosen.rung in ("linear", "distilled") and chosen.fitted_to == SAMPLES[0][0]
    assert set(chosen.fidelity) == {"linear", "distilled"}
    assert len(generator.asked) == sum(SAMPLES[0]) and len({number % 100 for number in generator.asked}) == 80


def test_where_the_vae_reaches_the_cap_it_stays(log: Log) -> None:
    generator = SlowGenerator(sampling=0.001, decoding=0.002)
    assert choose(generator, log, cap=2).rung == "vae" and len(generator.asked) == 2


def test_several_devices_reach_the_cap_by_the_vae(log: Log) -> None:
    generator: Any = SlowGenerator(sampling=0.005, decoding=0.04)
    chosen = choose_decoder(generator, "auto", None, left=6000.0, cap=500, devices=8, log=log)
    assert chosen.rung == "vae"


def test_an_unfaithful_student_is_not_taken_for_a_little_time(log: Log) -> None:
    def noise(latents: torch.Tensor) -> torch.Tensor:
        return (latents * 1e4).sin()

    assert choose(SlowGenerator(sampling=0.01, decoding=0.01, shape=noise), log).rung == "vae"


def test_few_images_are_fitted_to_where_many_take_too_long(log: Log) -> None:
    generator = SlowGenerator(sampling=0.01, decoding=0.06)
    assert choose(generator, log, left=20.0).rung != "vae"
    assert len(generator.asked) == sum(SAMPLES[1])


def test_without_time_to_look_the_vae_stays_and_it_is_said(log: Log) -> None:
    generator = SlowGenerator(sampling=0.02, decoding=0.02)
    assert choose(generator, log, left=0.6).rung == "vae"
    assert "no time to look for a faster decoder" in log.warnings[0] and len(generator.asked) == 2


def test_where_latents_are_coarser_than_pixels_nothing_is_tried(log: Log) -> None:
    generator = SlowGenerator(side=16)
    assert choose(generator, log).rung == "vae" and generator.asked == []
    assert choose(generator, log, "linear").rung == "linear", "unless it is asked for"


def test_a_decoder_that_cannot_be_measured_is_said(log: Log) -> None:
    assert choose(SlowGenerator(decoding=0.02, shape=lambda pixels: pixels * torch.nan), log).rung == "vae"
    assert "the VAE stays" in log.warnings[0]


def test_latents_that_are_broken_leave_it_to_the_vae(log: Log) -> None:
    generator: Any = SlowGenerator(decoding=0.02)
    generator.latents = lambda numbers, _: torch.full((len(numbers), 4, 32, 32), torch.nan)
    assert choose(generator, log).rung == "vae" and "the VAE stays" in log.warnings[0]


def test_what_is_not_there_is_said(log: Log) -> None:
    with pytest.raises(UsageError, match="AutoencoderTiny"):
        choose(SlowGenerator(), log, "tiny")


@given(rounds=st.floats(1, 1000), cap=st.integers(1, 1000), decibels=st.floats(15, 60))
def test_more_rounds_and_more_fidelity_are_worth_no_less(rounds: float, cap: int, decibels: float) -> None:
    assert worth(rounds + 1, cap, decibels) >= worth(rounds, cap, decibels)
    assert worth(rounds, cap, decibels + 1) > worth(rounds, cap, decibels)

"""The student learns from a teacher whose every answer is known."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tools.training.test_diffusion import OfGaussians, numbered
from tools.training import distil, layout
from tools.training.diffusion import NoiseSchedule, Teacher, noise_schedule
from tools.training.distil import Pairs, make_pairs, train_distil, train_match
from tools.training.layout import Conditioning
from tools.training.progress import Progress
from tools.training.prompts import Prompts

CPU = torch.device("cpu")
# Three prompts, the last the empty one.
PROMPTS = Prompts(torch.zeros(3, 1, dtype=torch.long), torch.ones(1), torch.ones(2))


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> layout.Networks:
    monkeypatch.setattr(layout, "UNET_WIDTHS", (32, 32))
    torch.manual_seed(0)
    return layout.build_networks(["a photo of an apple"])


@pytest.fixture
def schedule(networks: layout.Networks) -> NoiseSchedule:
    return noise_schedule(networks.scheduler, CPU)


@pytest.fixture
def begin(tmp_path: Path) -> Callable[[layout.Networks], Progress]:
    def make(networks: layout.Networks) -> Progress:
        return Progress(tmp_path, 1000, {"unet": networks.unet}, torch.Generator().manual_seed(0), {})

    return make


def embeddings() -> Conditioning:
    """As `numbered`, in the UNet's widths."""
    pooled = torch.zeros(3, layout.POOLED_WIDTH)
    pooled[:, :1] = numbered(3).pooled
    return Conditioning(torch.zeros(3, 1, sum(layout.TEXT_WIDTHS)), pooled)


def samples(networks: layout.Networks) -> Tensor:
    noise = torch.randn(32, *layout.LATENT_SHAPE, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return layout.one_step_latents(networks, noise, embeddings().of(torch.zeros(32, dtype=torch.long)))


def test_pairs_are_of_the_teachers_classes(schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "PAIRS", 40)
    monkeypatch.setattr(distil, "SOLVED_AT_ONCE", 10)
    teacher = Teacher(OfGaussians(schedule, torch.tensor([2.0, -2.0, 0.0]), 0.3), schedule, numbered(3))
    pairs = make_pairs(teacher, PROMPTS, torch.Generator().manual_seed(0))
    assert set(pairs.rows.tolist()) == {0, 1}
    sides = pairs.latents.float().mean(dim=(1, 2, 3)).sign()
    assert torch.equal(sides, torch.where(pairs.rows == 0, 1.0, -1.0))
    assert pairs.noise.float().std().item() == pytest.approx(1, abs=0.05)


def test_a_student_learns_where_the_teacher_leads(
    networks: layout.Networks, begin: Callable[[layout.Networks], Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "DISTIL_BATCH", 16)
    noise = torch.randn(32, *layout.LATENT_SHAPE, generator=torch.Generator().manual_seed(9))
    pairs = Pairs(noise.half(), (0.5 * noise + 1).half(), torch.zeros(32, dtype=torch.long))
    before = (samples(networks) - pairs.latents.float()).square().mean()
    train_distil(networks, begin(networks), embeddings(), pairs, 30, lambda: None)
    assert (samples(networks) - pairs.latents.float()).square().mean() < 0.5 * before


def test_a_student_moves_to_what_the_teacher_finds_likely(
    networks: layout.Networks,
    schedule: NoiseSchedule,
    begin: Callable[[layout.Networks], Progress],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distil, "MATCH_BATCH", 8)
    # With and without a prompt the same, so that guidance changes nothing.
    teacher = Teacher(OfGaussians(schedule, torch.tensor([1.0, 1.0, 1.0]), 0.5), schedule, embeddings())
    rival = copy.deepcopy(networks.unet)
    before, rival_before = samples(networks).mean(), rival.conv_out.weight.clone()
    train_match(networks, teacher, rival, begin(networks), PROMPTS, 20, lambda: None)
    assert abs(samples(networks).mean() - 1) < 0.9 * abs(before - 1)
    assert not torch.equal(rival.conv_out.weight, rival_before), "the rival learnt nothing"

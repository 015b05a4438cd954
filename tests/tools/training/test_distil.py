"""The student learns from a teacher whose every answer is known."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.tools.training.test_diffusion import CONFIG, OfGaussians, numbered
from tools.training import distil, layout
from tools.training.diffusion import NoiseSchedule, Teacher, noise_schedule
from tools.training.distil import Pairs, make_pairs, train_distil, train_match
from tools.training.images import RealImages
from tools.training.layout import Conditioning
from tools.training.progress import Pace, Progress
from tools.training.prompts import Prompts

CPU = torch.device("cpu")
# Three prompts, the last the empty one; a class for each of the others, two of the smallest canvas.
PROMPTS = Prompts(torch.zeros(3, 1, dtype=torch.long), torch.tensor([[0], [1]]), torch.ones(1))
IMAGES = [RealImages(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(2, dtype=torch.long))]


@pytest.fixture
def schedule(networks: layout.Networks) -> NoiseSchedule:
    return noise_schedule(networks.scheduler, CPU)


def embeddings() -> Conditioning:
    """As `numbered`, in the UNet's widths."""
    pooled = torch.zeros(3, layout.POOLED_WIDTH)
    pooled[:, :1] = numbered(3).pooled
    return Conditioning(torch.zeros(3, 1, sum(layout.TEXT_WIDTHS)), pooled)


def samples(networks: layout.Networks) -> Tensor:
    noise = torch.randn(32, *layout.latent_shape(32), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return layout.one_step_latents(networks, noise, embeddings().of(torch.zeros(32, dtype=torch.long)))


def test_pairs_are_of_the_teachers_classes(
    schedule: NoiseSchedule, begin: Callable[[str, int], Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "PAIRS", 64)
    monkeypatch.setattr(distil, "SOLVED_AT_ONCE", 64)
    teacher = Teacher(OfGaussians(schedule, torch.tensor([2.0, -2.0, 0.0]), 0.3), schedule, numbered(3), CONFIG)
    (pairs,) = make_pairs(teacher, begin("pairs", 1), PROMPTS, IMAGES)
    assert len(pairs.rows) == 64 and set(pairs.rows.tolist()) == {0, 1}
    sides = pairs.latents.float().mean(dim=(1, 2, 3)).sign()
    assert torch.equal(sides, torch.where(pairs.rows == 0, 1.0, -1.0))
    assert pairs.noise.float().std().item() == pytest.approx(1, abs=0.05)


def test_the_pace_of_pairs_is_that_of_all_canvases(
    schedule: NoiseSchedule, begin: Callable[[str, int], Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "PAIRS", 400)
    monkeypatch.setattr(distil, "SOLVED_AT_ONCE", 128)
    both = [
        RealImages(torch.zeros(1, 3, size, size, dtype=torch.uint8), torch.ones(1, dtype=torch.long), first)
        for first, size in enumerate((32, 64))
    ]
    teacher = Teacher(OfGaussians(schedule, torch.tensor([2.0, -2.0, 0.0]), 0.3), schedule, numbered(3), CONFIG)
    progress = begin("pairs", 1)
    said: list[Pace] = []
    monkeypatch.setattr(progress.log, "status", said.append)
    made = make_pairs(teacher, progress, PROMPTS, both)
    assert said[-1].batch * len(said) == sum(len(pairs.rows) for pairs in made)


def test_a_student_learns_where_the_teacher_leads(
    networks: layout.Networks, begin: Callable[[str, int], Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "DISTIL_BATCH", 64)
    noise = torch.randn(32, *layout.latent_shape(32), generator=torch.Generator().manual_seed(9))
    pairs = Pairs(noise.half(), (0.5 * noise + 1).half(), torch.zeros(32, dtype=torch.long))
    before = (samples(networks) - pairs.latents.float()).square().mean()
    train_distil(networks, begin("distil", 30), embeddings(), [pairs], IMAGES, lambda: None)
    assert (samples(networks) - pairs.latents.float()).square().mean() < 0.5 * before


def test_a_student_moves_to_what_the_teacher_finds_likely(
    networks: layout.Networks,
    schedule: NoiseSchedule,
    begin: Callable[[str, int], Progress],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distil, "MATCH_BATCH", 32)
    # With and without a prompt the same, so that guidance changes nothing.
    teacher = Teacher(OfGaussians(schedule, torch.tensor([1.0, 1.0, 1.0]), 0.5), schedule, embeddings(), CONFIG)
    rival = copy.deepcopy(networks.unet)
    before, rival_before = samples(networks).mean(), rival.conv_out.weight.clone()
    train_match(networks, teacher, rival, begin("match", 20), PROMPTS, IMAGES, lambda: None)
    assert abs(samples(networks).mean() - 1) < 0.9 * abs(before - 1)
    assert not torch.equal(rival.conv_out.weight, rival_before), "the rival learnt nothing"

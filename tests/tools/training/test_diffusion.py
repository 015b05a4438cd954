"""The teacher's arithmetic, on teachers whose every answer is known."""

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor

from tools.training import diffusion
from tools.training.diffusion import (
    Latents,
    NoiseSchedule,
    Teacher,
    column,
    denoise,
    denoise_guided,
    noise_schedule,
    solver_of,
    train_diffusion,
)
from tools.training.images import RealImages
from tools.training.layout import Conditioning, Networks, token_ids
from tools.training.progress import Progress
from tools.training.prompts import Prompts
from tools.training.vae import encode_images

CPU = torch.device("cpu")
SCHEDULER = EulerAncestralDiscreteScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
)
CONFIG = SCHEDULER.config


@pytest.fixture
def schedule() -> NoiseSchedule:
    return noise_schedule(SCHEDULER, CPU)


class OfGaussians:
    """The v that is to be expected where prompt p asks for latents around `means[p]` with deviation `spread`."""

    def __init__(self, schedule: NoiseSchedule, means: Tensor, spread: float) -> None:
        self.schedule, self.means, self.spread = schedule, means, spread

    def __call__(self, noisy: Tensor, timesteps: Tensor, added_cond_kwargs: dict[str, Tensor], **_: Any) -> Any:
        alpha, sigma = column(self.schedule.alphas[timesteps]), column(self.schedule.sigmas[timesteps])
        mean = column(self.means[added_cond_kwargs["text_embeds"][:, 0].long()])
        variance = self.spread**2
        clean = mean + variance * alpha / (alpha**2 * variance + sigma**2) * (noisy - alpha * mean)
        return SimpleNamespace(sample=(alpha * noisy - clean) / sigma)


def numbered(prompts: int) -> Conditioning:
    """A pooled embedding that is the prompt's number; the last prompt is the empty one."""
    return Conditioning(torch.zeros(prompts, 1, 1), torch.arange(prompts).float().view(-1, 1))


def test_the_schedule_keeps_the_variance(schedule: NoiseSchedule) -> None:
    torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, torch.ones(1000))
    assert (schedule.sigmas.diff() > 0).all()


def test_a_noisy_gaussian_is_denoised_to_what_is_to_be_expected(schedule: NoiseSchedule) -> None:
    torch.manual_seed(0)
    mean, spread, timestep = 1.5, 0.5, 400
    unet = OfGaussians(schedule, torch.tensor([mean]), spread)
    clean = mean + spread * torch.randn(4000, 1, 4, 4)
    noise = torch.randn(clean.shape)
    timesteps = torch.full((len(clean),), timestep)
    noisy = schedule.noisy(clean, timesteps, noise)
    expected = denoise(unet, schedule, noisy, timesteps, numbered(1).of(torch.zeros_like(timesteps)))
    error = clean - expected
    assert abs(error.mean()) < 0.02
    assert abs((error * noisy).mean() - error.mean() * noisy.mean()) < 0.02, "a linear guess would be nearer"


def test_the_solver_leads_noise_to_samples(schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "SOLVER_STEPS", 40)
    means, spread = torch.tensor([-2.0, 0.5, 0.5]), 0.7
    monkeypatch.setattr(diffusion, "GUIDANCE", 1.0)
    solve = solver_of(Teacher(OfGaussians(schedule, means, spread), schedule, numbered(3), CONFIG))
    noise = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([0, 1, 0, 1, 0, 1])
    alpha, sigma = schedule.alphas[-1], schedule.sigmas[-1]
    # Along the flow between Gaussians a point keeps its distance from the mean in deviations.
    mean = column(means[rows])
    exact = mean + spread * (noise - alpha * mean) / (alpha**2 * spread**2 + sigma**2).sqrt()
    torch.testing.assert_close(solve(noise, rows), exact, atol=0.02, rtol=0)


def test_guidance_goes_further_the_way_the_prompt_leads(schedule: NoiseSchedule) -> None:
    unet, encoded = OfGaussians(schedule, torch.tensor([2.0, 0.0]), 0.5), numbered(2)
    timesteps = torch.full((3,), 600)
    noisy = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    rows = torch.zeros(3, dtype=torch.long)
    prompted = denoise(unet, schedule, noisy, timesteps, encoded.of(rows))
    unprompted = denoise(unet, schedule, noisy, timesteps, encoded.of(rows + 1))
    guided = denoise_guided(Teacher(unet, schedule, encoded, CONFIG), noisy, timesteps, rows)
    torch.testing.assert_close(guided - unprompted, diffusion.GUIDANCE * (prompted - unprompted))


@pytest.fixture
def learnt(networks: Networks, begin: Callable[[str, int], Progress]) -> Callable[[], tuple[list[str], list[str]]]:
    """Trains a teacher for some steps, on two canvases; what it says of its losses, and what it warns of."""
    prompts = Prompts(token_ids(networks, ["a photo of an apple", ""]), torch.tensor([[0], [0]]), torch.ones(1))
    generator = torch.Generator().manual_seed(3)
    images = [
        RealImages(torch.randint(256, (8, 3, size, size), generator=generator).byte(), torch.tensor([8]), first)
        for first, size in enumerate((32, 64))
    ]
    unet = networks.unet

    def train() -> tuple[list[str], list[str]]:
        progress = begin("diffusion", 10)
        train_diffusion(copy.deepcopy(networks), copy.deepcopy(unet), progress, prompts, images, lambda: None)
        return progress.journal.lines, progress.log.warnings

    return train


def test_latents_are_encoded_when_they_are_asked_for(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(4)).byte()
    images, encoded = RealImages(pixels, torch.tensor([20])), []

    def encode(vae: Any, pixels: Tensor) -> Tensor:
        encoded.append(len(pixels))
        return encode_images(vae, pixels)

    monkeypatch.setattr(diffusion, "encode_images", encode)
    latents = Latents(networks.vae, images)
    for numbers in ([3, 25, 3], [25, 3], range(18), range(40)):
        which = torch.tensor([*numbers])
        wanted = encode_images(networks.vae, torch.cat([pixels, pixels.flip(-1)]))[which]
        torch.testing.assert_close(latents[which], wanted, atol=1e-4, rtol=1e-4)
    # 2 of them, none, 17 and 21, always as many at a time.
    assert encoded == [diffusion.ENCODED_TOGETHER] * 5
    every = torch.arange(40)
    assert torch.equal(Latents(networks.vae, images)[every], latents[every]), "whatever they were encoded beside"


def test_a_compiled_teacher_learns_as_one_that_is_not(
    learnt: Callable[[], tuple[list[str], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion, "BATCH", 32)
    plain, _ = learnt()
    monkeypatch.setattr(diffusion, "COMPILES_FROM", {"cpu": 0.0})
    compiled = []  # what is compiled is not generated: that takes minutes

    def compiler(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    again, warnings = learnt()
    assert len(compiled) == 2, "one for each canvas, and none of them anew in a step"
    assert again == plain and not warnings


def test_where_nothing_can_be_compiled_a_teacher_learns_all_the_same(
    learnt: Callable[[], tuple[list[str], list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion, "BATCH", 32)
    monkeypatch.setattr(diffusion, "COMPILES_FROM", {"cpu": 0.0})

    def compiler(graph: Any, _: Any) -> Any:
        raise FileNotFoundError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    lines, warnings = learnt()
    assert len(lines) == 1
    assert len(warnings) == 1 and "cannot compile" in warnings[0]

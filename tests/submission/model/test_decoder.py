"""The rungs of the ladder: each makes what the VAE makes, to its fidelity."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st

from submission.dataset.dataset_file import mean_and_std
from submission.distillation.convnet import ConvNet
from submission.errors import UsageError
from submission.model import decoder, pipeline
from submission.model.calibration import SAMPLES
from submission.model.checkpoint import EMBEDDED, inspect
from submission.model.decoder import (
    STEPS,
    canvases,
    choose_vae_dtype,
    decode,
    fit_student,
    full_decoder,
    load_student,
    psnr,
    save_student,
    student_decoder,
    tiny_decoder,
)
from submission.tasks import load_task
from tests.tools.real_data import real_subset, real_test_images
from tools.scoring.fast import make_forward, probe
from tools.scoring.training import BATCH_SIZE, Schedule, assess, train

CPU = torch.device("cpu")
CIFAR100 = load_task("cifar100")


@pytest.fixture(scope="module")
def vae(checkpoint_folder: Path) -> Any:
    return pipeline.load_vae(inspect(checkpoint_folder, "test"), CPU, torch.float32)


def latents(count: int = 8, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed))


class LinearVae:
    """A decoder that is a linear map, of a latent to a square of `2 ** (blocks - 1)` pixels, and no more."""

    dtype = torch.float32

    def __init__(self, blocks: int) -> None:
        self.config = SimpleNamespace(scaling_factor=0.5, block_out_channels=[8] * blocks)
        self.factor = 2 ** (blocks - 1)
        self.weight = torch.randn(3 * self.factor**2, 4, 1, 1, generator=torch.Generator().manual_seed(1)) / 8

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (F.pixel_shuffle(F.conv2d(latents, self.weight), self.factor),)


@pytest.mark.parametrize(("blocks", "side", "size"), [(1, 16, 16), (1, 32, 16), (2, 16, 16)])
def test_a_linear_decoder_is_found_out(blocks: int, side: int, size: int) -> None:
    full = full_decoder(LinearVae(blocks), size)
    given, new = latents(8, side), latents(5, side, seed=1)
    student = fit_student(given, full.canvas(given), steps=0)
    # Where the canvas is shrunk, the filter that shrinks it reaches beyond the student's kernel.
    assert psnr(student(new).detach(), full.canvas(new)) > (50 if blocks == 1 and side == size else 30)


@pytest.mark.parametrize(("side", "size"), [(16, 8), (16, 16), (20, 16), (8, 16)])
def test_any_size_of_latents_and_pixels(side: int, size: int) -> None:
    truth = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(2)) - 0.5
    assert fit_student(latents(8, side), truth, steps=2)(latents(3, side)).shape == (3, 3, size, size)


def test_the_same_latents_give_the_same_network_and_leave_the_random_numbers_alone(vae: Any) -> None:
    given = latents(8, 16)
    truth = canvases(full_decoder(vae, 8), given)
    torch.manual_seed(7)
    expected, _ = torch.rand(3), torch.manual_seed(7)
    first, second = (fit_student(given, truth, steps=5) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_network_is_the_same_in_another_process(vae: Any) -> None:
    given = latents(8, 16)
    made = student_decoder("distilled", fit_student(given, canvases(full_decoder(vae, 8), given), steps=3))
    network = save_student(made)
    assert network is not None and save_student(full_decoder(vae, 8)) is None
    loaded = load_student(network, "distilled", 8, CPU)
    for damaged in (b"", network[:-1], network[: len(network) // 2], b"x" * 100):
        with pytest.raises(UsageError, match="start anew without --resume"):
            load_student(damaged, "distilled", 8, CPU)
    assert torch.equal(canvases(loaded, given), canvases(made, given))


def test_training_brings_it_nearer(vae: Any) -> None:
    given, new = latents(16, 16), latents(8, 16, seed=1)
    full = full_decoder(vae, 8)
    untrained, trained = (
        psnr(canvases(student_decoder("distilled", fit_student(given, canvases(full, given), steps)), new), truth)
        for truth in [canvases(full, new)]
        for steps in (0, 150)
    )
    assert trained > untrained


def test_one_image_s_pixels_depend_on_no_other(vae: Any) -> None:
    given = latents(8, 16)
    chosen = student_decoder("distilled", fit_student(given, canvases(full_decoder(vae, 8), given), steps=3))
    together, _ = decode(chosen, latents(6, 16, seed=2))
    for index, image in enumerate(latents(6, 16, seed=2)):
        alone, _ = decode(chosen, image[None])
        assert (alone[0].int() - together[index].int()).abs().max() <= 1


def test_a_tiny_autoencoder_takes_the_unet_s_latents_as_they_are(tmp_path: Path) -> None:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), upsampling_scaling_factor=2,
    )  # fmt: skip
    made = tiny_decoder(tiny, 8)
    with torch.no_grad():
        expected = F.interpolate(tiny.decode(latents(2)).sample, size=(8, 8), mode="bicubic", antialias=True)
    assert made.rung == "tiny"
    torch.testing.assert_close(canvases(made, latents(2)), expected)


@given(noise=st.floats(0.001, 0.5))
@settings(max_examples=20)
def test_psnr(noise: float) -> None:
    truth = torch.zeros(2, 3, 64, 64)
    # In pixels of 0..1 the error is half as large.
    assert psnr(truth + noise, truth) == pytest.approx(-20 * torch.tensor(noise / 2).log10().item(), abs=1e-3)
    assert psnr(truth + 3, truth + 1) == pytest.approx(120), "beyond white there is nothing to see"


def embedded_latents(canvas: int, ipc: int = 1) -> tuple[Any, torch.Tensor]:
    """The embedded checkpoint's VAE, and what it makes of real images, so many per class of CIFAR-100, on canvases of
    that many pixels."""
    vae = pipeline.load_vae(inspect(EMBEDDED, "test"), CPU, torch.float32)
    mean, std = mean_and_std(CIFAR100)
    means = []
    for images in torch.split(real_subset(CIFAR100, ipc, seed=0), 100):
        large = F.interpolate((images * std + mean) * 2 - 1, size=(canvas, canvas), mode="bicubic", antialias=True)
        with torch.no_grad():
            means.append(vae.encode(large.clamp(-1, 1)).latent_dist.mean)
    return vae, torch.cat(means) * vae.config.scaling_factor


@pytest.mark.parametrize(("samples", "steps", "least"), [(SAMPLES[0], STEPS, 35.0), (SAMPLES[1], 0, 30.0)])
def test_a_trained_vae_is_replaced_where_latents_are_as_fine_as_the_pixels(
    samples: tuple[int, int], steps: int, least: float
) -> None:
    """A trained student keeps 35 dB and more, and an untrained one, fitted to a few images, still 30."""
    vae, found = embedded_latents(canvas=128)
    fitted, held_out = samples
    drawn = found[:: len(found) // (fitted + held_out)][: fitted + held_out]
    truth = canvases(full_decoder(vae, 32), drawn)
    student = student_decoder("distilled", fit_student(drawn[:fitted], truth[:fitted], steps))
    assert psnr(canvases(student, drawn[fitted:]), truth[fitted:]) >= least


@pytest.fixture
def all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_images_of_the_student_are_worth_as_much(all_cores: None) -> None:
    """The evaluator's network learns real images, 50 per class, decoded either way from latents as fine as the pixels,
    and recognises as many of the test images, to within the spread of three runs each."""
    vae, found = embedded_latents(canvas=128, ipc=50)
    full = full_decoder(vae, 32)
    drawn = found[:: len(found) // 64][:64]
    student = student_decoder("distilled", fit_student(drawn, canvases(full, drawn)))
    accuracies = {made.rung: accuracies_after(made, found) for made in (student, full)}
    print(accuracies)
    assert accuracies["distilled"].mean() == pytest.approx(accuracies["vae"].mean(), abs=0.006)
    assert accuracies["vae"].mean() > 0.15


def accuracies_after(made: decoder.Decoder, found: torch.Tensor) -> torch.Tensor:
    """Of three networks trained on the images that a decoder makes of latents, as many of each class of CIFAR-100."""
    pixels, sound = decode(made, found)
    assert sound.all()
    mean, std = mean_and_std(CIFAR100)
    labels = torch.arange(100).repeat_interleave(len(found) // 100)
    accuracies = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = ConvNet(100, 32)
        forward = make_forward(net, BATCH_SIZE, probe(net, BATCH_SIZE))
        train(net, (pixels / 255 - mean) / std, labels, Schedule(max_steps=600), forward=forward)
        accuracies.append(assess(net, *real_test_images(CIFAR100))[0].accuracy)
    return torch.tensor(accuracies)


def test_decoding_in_parts_and_resizing(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = full_decoder(vae, 8)
    whole, _ = decode(full, latents(5))
    assert whole.shape == (5, 3, 8, 8) and whole.dtype == torch.uint8
    monkeypatch.setattr(decoder, "canvases_per_pass", lambda *_: 1)
    parts, _ = decode(full, latents(5))
    assert (whole.int() - parts.int()).abs().max() <= 1


def test_broken_images_are_noticed(checkpoint_folder: Path) -> None:
    vae = pipeline.load_vae(inspect(checkpoint_folder, "test"), CPU, torch.float32)
    given = latents(3)
    given[1, 0, 0, 0] = torch.nan
    _, sound = decode(full_decoder(vae, 16), given)
    assert sound.tolist() == [True, False, True]
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    torch.nn.init.zeros_(vae.decoder.conv_out.bias)
    _, sound = decode(full_decoder(vae, 16), given[:1])
    assert sound.tolist() == [False], "one constant colour"


def test_the_vae_never_runs_in_fp16() -> None:
    for device in (CPU, torch.device("cuda")):
        assert choose_vae_dtype(device, torch.float16) != torch.float16

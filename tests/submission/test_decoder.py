"""The ladder of decoders: each rung's fidelity is what it is, and the cheapest that keeps the threshold is taken."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from submission import decoder, pipeline
from submission.checkpoint import EMBEDDED, inspect
from submission.dataset_file import mean_and_std
from submission.decoder import (
    CALIBRATION,
    FITTED,
    choose_decoder,
    choose_vae_dtype,
    decode,
    full_decoder,
    psnr,
)
from submission.errors import UsageError
from submission.tasks import load_task
from tests.tools.real_data import real_subset, real_test_images
from tools.convnet import ConvNet
from tools.fast import make_forward, probe
from tools.training import BATCH_SIZE, Schedule, assess, train

CPU = torch.device("cpu")
CIFAR100 = load_task("cifar100")


@pytest.fixture(scope="module")
def vae(checkpoint_folder: Path) -> Any:
    return pipeline.load_vae(inspect(checkpoint_folder, "test"), CPU, torch.float32)


def latents(count: int = CALIBRATION, side: int = 8, seed: int = 0) -> torch.Tensor:
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


@pytest.mark.parametrize(("blocks", "side", "size"), [(2, 8, 16), (3, 8, 32), (1, 16, 16)])
def test_a_linear_decoder_is_found_out(blocks: int, side: int, size: int) -> None:
    vae = LinearVae(blocks)
    chosen = choose_decoder(vae, latents(side=side), size)
    assert chosen.rung == "linear"
    assert chosen.fidelity["linear"] > 50
    new = latents(5, side, seed=1)
    ours, _ = decode(chosen, new)
    theirs, _ = decode(full_decoder(vae, size), new)
    assert (ours.int() - theirs.int()).abs().max() <= 2


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("rung", ["linear", "pooled"])
def test_fidelity_is_measured_on_latents_that_were_not_fitted_to(vae: Any, rung: decoder.Rung, size: int) -> None:
    given = latents(side=16)
    chosen = choose_decoder(vae, given, size, rung)
    assert chosen.rung == rung
    truth = full_decoder(vae, size).canvas(given)
    assert chosen.fidelity == {rung: pytest.approx(psnr(chosen.canvas(given[FITTED:]), truth[FITTED:]), abs=1e-3)}


@pytest.mark.parametrize(
    ("threshold", "expected"), [(-100.0, ["linear"]), (200.0, ["linear", "pooled", "vae"])], ids=["low", "high"]
)
def test_the_cheapest_good_enough_is_taken(
    vae: Any, monkeypatch: pytest.MonkeyPatch, threshold: float, expected: list[str]
) -> None:
    monkeypatch.setattr(decoder, "FIDELITY", threshold)
    chosen = choose_decoder(vae, latents(side=16), 8)
    assert chosen.rung == expected[-1]
    assert list(chosen.fidelity) == [rung for rung in expected if rung != "vae"]


def test_what_cannot_be_had_is_said(vae: Any) -> None:
    with pytest.raises(UsageError, match="not finer"):
        choose_decoder(vae, latents(side=4), 16, "pooled")


def test_broken_latents_leave_it_to_the_vae(vae: Any) -> None:
    given = latents()
    given[3, 0, 0, 0] = torch.nan
    assert choose_decoder(vae, given, 16).rung == "vae"


def test_one_image_s_pixels_depend_on_no_other(vae: Any) -> None:
    chosen = choose_decoder(vae, latents(side=16), 8, "linear")
    together, _ = decode(chosen, latents(6, 16, seed=2))
    for index, image in enumerate(latents(6, 16, seed=2)):
        alone, _ = decode(chosen, image[None])
        assert (alone[0].int() - together[index].int()).abs().max() <= 1


@given(noise=st.floats(0.001, 0.5))
@settings(max_examples=20, deadline=None)
def test_psnr(noise: float) -> None:
    truth = torch.zeros(2, 3, 64, 64)
    # In pixels of 0..1 the error is half as large.
    assert psnr(truth + noise, truth) == pytest.approx(-20 * torch.tensor(noise / 2).log10().item(), abs=1e-3)
    assert psnr(truth + 3, truth + 1) == pytest.approx(120), "beyond white there is nothing to see"


def embedded_latents(canvas: int, ipc: int = 1) -> tuple[Any, torch.Tensor]:
    """The embedded checkpoint's VAE, and what it makes of real images, so many a class of CIFAR-100, on canvases of
    that many pixels."""
    vae = pipeline.load_vae(inspect(EMBEDDED, "test"), CPU, torch.float32)
    mean, std = mean_and_std(CIFAR100)
    means = []
    for images in torch.split(real_subset(CIFAR100, ipc, seed=0), 100):
        large = F.interpolate((images * std + mean) * 2 - 1, size=(canvas, canvas), mode="bicubic", antialias=True)
        with torch.inference_mode():
            means.append(vae.encode(large.clamp(-1, 1)).latent_dist.mean)
    return vae, torch.cat(means) * vae.config.scaling_factor


def spread(latents: torch.Tensor) -> torch.Tensor:
    """As many as a decoder is chosen by, of all classes."""
    return latents[:: len(latents) // CALIBRATION][:CALIBRATION]


def test_a_trained_vae_is_replaced_where_latents_are_as_fine_as_the_pixels() -> None:
    vae, found = embedded_latents(canvas=128)
    chosen = choose_decoder(vae, spread(found), 32)
    assert chosen.rung == "linear"
    assert chosen.fidelity["linear"] >= decoder.FIDELITY


@pytest.fixture
def all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_images_of_the_cheap_decoder_are_worth_as_much(all_cores: None) -> None:
    """The evaluator's network learns real images, 50 a class, decoded either way from latents as fine as the pixels,
    and recognises as many of the test images, to within one in a hundred."""
    vae, found = embedded_latents(canvas=128, ipc=50)
    chosen = choose_decoder(vae, spread(found), 32)
    assert chosen.rung == "linear"
    accuracies = {made.rung: accuracy_after(made, found) for made in (chosen, full_decoder(vae, 32))}
    print(chosen.fidelity, accuracies)
    assert accuracies["linear"] == pytest.approx(accuracies["vae"], abs=0.01)
    assert accuracies["vae"] > 0.15


def accuracy_after(made: decoder.Decoder, found: torch.Tensor) -> float:
    """Of a network trained on the images that a decoder makes of latents, as many of each class of CIFAR-100."""
    pixels, sound = decode(made, found)
    assert sound.all()
    mean, std = mean_and_std(CIFAR100)
    labels = torch.arange(100).repeat_interleave(len(found) // 100)
    torch.manual_seed(0)
    net = ConvNet(100, 32)
    forward = make_forward(net, BATCH_SIZE, probe(net, BATCH_SIZE))
    train(net, (pixels / 255 - mean) / std, labels, Schedule(max_steps=600), forward=forward)
    return assess(net, *real_test_images(CIFAR100)).measure.accuracy


def test_a_trained_vae_is_kept_where_they_are_coarser() -> None:
    vae, found = embedded_latents(canvas=32)
    chosen = choose_decoder(vae, spread(found), 32)
    assert chosen.rung == "vae"
    assert chosen.fidelity["linear"] < decoder.FIDELITY


def test_decoding_in_parts_and_resizing(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = full_decoder(vae, 8)
    whole, _ = decode(full, latents(5))
    assert whole.shape == (5, 3, 8, 8) and whole.dtype == torch.uint8
    monkeypatch.setattr(decoder, "PIXELS_A_PASS", 1)
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
